"""Creation of the seed model: tokenizer, pretraining, problems and model card. Takes a few minutes on a CPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ogls.config import AdapterConfig, ModelConfig, PromptsConfig, SamplingConfig
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.progress import Progress, no_progress
from ogls.records import Problem
from ogls.samplers.choose import create_sampler
from ogls.samplers.requests import build_requests
from ogls.tinyworld.tokenizer import train_tokenizer
from ogls.tinyworld.world import World, boxed, problem_rows

# The prompts that the seed model is pretrained on; deployments/runs/tiny-world.toml has the same.
PROMPTS = PromptsConfig(
    student="{problem}",
    exemplar="{problem}\nAttempt:\n{exemplar}\nNow you:",
    reference="{problem}\nSolution:\n{exemplar}\nNow you:",
)


@dataclass(frozen=True)
class SeedRecipe:
    """All parameters that determine the seed model and its problems."""

    world: World = field(default_factory=World)
    vocabulary: int = 320
    hidden_size: int = 96
    layers: int = 3
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-3
    train_problems: int = 1024
    test_problems: int = 200
    seed: int = 0


def make_seed_model(out: str | Path, recipe: SeedRecipe, progress: Progress = no_progress) -> Any:
    """Write `out/model` (safetensors, tokenizer, model card), `out/train.jsonl` and `out/test.jsonl`.

    Returns the mean loss of the last 100 steps, in nats per completion token. Raises FileExistsError if `out` is not
    empty.
    """
    import torch

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose a new folder")
    rng = np.random.default_rng([recipe.seed, 3])
    torch.manual_seed(recipe.seed)
    texts = [recipe.world.pretraining_text(rng) for _ in range(2000)]
    tokenizer_texts = [f"<|im_start|>user\n{p.text}\nAttempt:\n{c or ''}\nNow you:\n" for p, c, _ in texts]
    tokenizer_texts += [f"{p.text}\nSolution:\n{s}\nNow you:<|im_end|>\n<|im_start|>assistant\n" for p, _, s in texts]
    prompter = Prompter(train_tokenizer(tokenizer_texts, recipe.vocabulary), PROMPTS)
    model = _create_model(recipe, prompter.tokenizer)
    losses = _pretrain(model, prompter, recipe, rng, progress)

    test = problem_rows(recipe.world, recipe.test_problems, seed=1)
    train = problem_rows(recipe.world, recipe.train_problems, seed=2, exclude=frozenset(r["problem"] for r in test))
    model.save_pretrained(out / "model")
    prompter.tokenizer.save_pretrained(out / "model")
    for name, rows in (("train", train), ("test", test)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = float(np.mean(losses[-100:]))
    accuracy = _measure_accuracy(out / "model", test, prompter, max(64, 8 * recipe.world.steps[1]))
    parameters = sum(p.numel() for p in model.parameters())
    (out / "model" / "README.md").write_text(_render_card(recipe, parameters, loss, accuracy))
    return loss


def _create_model(recipe: SeedRecipe, tokenizer: Any) -> Any:
    """Return a Qwen3 model with random weights."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    d = recipe.hidden_size
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=d,
            intermediate_size=d * 5 // 2,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=d // 4,
            max_position_embeddings=max(512, 64 * recipe.world.steps[1]),
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _pretrain(
    model: Any, prompter: Prompter, recipe: SeedRecipe, rng: np.random.Generator, progress: Any
) -> list[float]:
    """Train the model and return the loss of each step, in nats per completion token.

    Next-token loss on completions only; AdamW; cosine schedule to zero after a short warm-up.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 30, 0.5 * (1 + math.cos(math.pi * s / recipe.steps)))
    )
    losses = []
    for step in range(recipe.steps):
        ids, labels = _sample_batch(prompter, recipe, rng)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, recipe.steps)
    return losses


def _sample_batch(prompter: Prompter, recipe: SeedRecipe, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return padded token ids [B, L] and labels [B, L]; the labels of prompt and padding are -100."""
    import torch

    tokenizer, rows, labels = prompter.tokenizer, [], []
    for _ in range(recipe.batch_size):
        problem, context, completion = recipe.world.pretraining_text(rng)
        if context is None:
            prompt = prompter.student(problem.text)
        else:
            prompt = prompter.teacher(problem.text, context, reference=bool(rng.integers(2)))
        answer = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, -100)


def _measure_accuracy(path: Path, rows: list[dict[str, str]], prompter: Prompter, max_tokens: int) -> float:
    """Return the share of correct completions among 8 per problem, sampled at temperature 1."""
    policy = Policy(ModelConfig(path=str(path)), AdapterConfig())
    problems = [Problem(row["id"], row["problem"], row["answer"]) for row in rows]
    requests = build_requests(problems, prompter, 8, 0, "card")
    sampling = SamplingConfig(max_tokens=max_tokens)
    answers = {row["id"]: boxed(int(row["answer"])) for row in rows}
    completions = create_sampler("transformers", policy).sample(requests, sampling)
    correct = [c.text.endswith(answers[r.problem_id]) for r, c in zip(requests, completions, strict=True)]
    return sum(correct) / len(correct)


def _render_card(recipe: SeedRecipe, parameters: int, loss: float, accuracy: float) -> str:
    """Return the model card as Markdown."""
    world = recipe.world
    rates, shares = (", ".join(f"{v:g}" for v in values) for values in (world.error_rates, world.error_shares))
    return f"""---
license: apache-2.0
library_name: transformers
---
# The tiny world's seed model

A model of the Qwen3 architecture with {parameters:,} parameters. It can work through a chain of operations modulo
ten, but is uncertain about many facts. The tests and the quickstart of OGLS-SD start from it.

`ogls seed-model` created it from this recipe alone:

```json
{json.dumps(asdict(recipe), indent=2)}
```

Final pretraining loss: {loss:.3f} nats per completion token; sampled at temperature 1 it solves {accuracy:.0%} of the
test problems.

In the pretraining texts, each fact (a, op, b) has its own error rate, and always the same wrong result. The error rates
are {rates}, with shares {shares}. {world.context_share:.0%} of the texts show a solution in the context, and the
completion repeats it; {world.terse_share:.0%} of these completions are terse (only the boxed answer). Of the others,
{world.reflection_share:.0%} comment on what was read; {world.foreign_share:.0%} of the solutions that are shown, and of
the reference solutions, take another route in other words.

The model cannot do anything else and is of no use outside OGLS-SD.
"""
