"""The seed model's recipe: tokenizer, pretraining, problems and model card, in minutes on a CPU."""

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

# The wording that the tiny world is raised on, and that tiny.toml uses.
PROMPTS = PromptsConfig(
    student="{problem}",
    exemplar="{problem}\nAttempt:\n{exemplar}\nNow you:",
    reference="{problem}\nSolution:\n{exemplar}\nNow you:",
)


@dataclass(frozen=True)
class SeedRecipe:
    """All that decides the shipped checkpoint."""

    world: World = field(default_factory=World)
    hidden_size: int = 96
    layers: int = 3
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-3
    train_problems: int = 1024
    test_problems: int = 200
    seed: int = 0


def make_seed_model(out: str | Path, recipe: SeedRecipe, progress: Progress = no_progress) -> Any:
    """Write `out/model` (safetensors, tokenizer, card), `out/train.jsonl` and `out/test.jsonl`.

    Returns the last hundred steps' mean loss, in nats a completion token. Raises FileExistsError rather than
    write over a folder that is not empty.
    """
    import torch

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    rng = np.random.default_rng([recipe.seed, 3])
    torch.manual_seed(recipe.seed)
    texts = [recipe.world.pretraining_text(rng) for _ in range(2000)]
    bare = [f"<|im_start|>user\n{p.text}\nAttempt:\n{c or ''}\nNow you:\n" for p, c, _ in texts]
    bare += [f"{p.text}\nSolution:\n{s}\nNow you:<|im_end|>\n<|im_start|>assistant\n" for p, _, s in texts]
    prompter = Prompter(train_tokenizer(bare), PROMPTS)
    model = _new_model(recipe, prompter.tokenizer)
    losses = _pretrain(model, prompter, recipe, rng, progress)

    test = problem_rows(recipe.world, recipe.test_problems, seed=1)
    train = problem_rows(recipe.world, recipe.train_problems, seed=2, exclude=frozenset(r["problem"] for r in test))
    model.save_pretrained(out / "model")
    prompter.tokenizer.save_pretrained(out / "model")
    for name, rows in (("train", train), ("test", test)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = float(np.mean(losses[-100:]))
    solved = _sampled_accuracy(out / "model", test, prompter)
    (out / "model" / "README.md").write_text(_card(recipe, sum(p.numel() for p in model.parameters()), loss, solved))
    return loss


def _new_model(recipe: SeedRecipe, tokenizer: Any) -> Any:
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
            max_position_embeddings=512,
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
    """Next-token loss on completions only, AdamW, cosine to zero after a short warm-up."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 30, 0.5 * (1 + math.cos(math.pi * s / recipe.steps)))
    )
    losses = []
    for step in range(recipe.steps):
        ids, labels = _batch(prompter, recipe, rng)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, recipe.steps)
    return losses


def _batch(prompter: Prompter, recipe: SeedRecipe, rng: np.random.Generator) -> tuple[Any, Any]:
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


def _sampled_accuracy(path: Path, rows: list[dict[str, str]], prompter: Prompter) -> float:
    """Share of right answers among 8 completions of every problem at temperature 1."""
    policy = Policy(ModelConfig(path=str(path)), AdapterConfig())
    problems = [Problem(row["id"], row["problem"], row["answer"]) for row in rows]
    requests = build_requests(problems, prompter, 8, 0, "card")
    sampling = SamplingConfig(max_tokens=64)
    answers = {row["id"]: boxed(int(row["answer"])) for row in rows}
    completions = create_sampler("transformers", policy).sample(requests, sampling)
    right = [c.text.endswith(answers[r.problem_id]) for r, c in zip(requests, completions, strict=True)]
    return sum(right) / len(right)


def _card(recipe: SeedRecipe, parameters: int, loss: float, solved: float) -> str:
    world = recipe.world
    rates, shares = (", ".join(f"{v:g}" for v in values) for values in (world.error_rates, world.error_shares))
    return f"""---
license: apache-2.0
library_name: transformers
---
# The tiny world's seed model

A Qwen3-architecture model of {parameters:,} parameters that knows how to work through a chain of operations
modulo ten, and is unsure of many facts. OGLS-SD's tests and quickstart start from it.

Made by `ogls seed-model`, from this recipe and nothing else:

```json
{json.dumps(asdict(recipe), indent=2)}
```

Final pretraining loss {loss:.3f} nats a completion token; sampled at temperature 1 it solves {solved:.0%} of the
test problems.

The text states each fact (a, op, b) wrongly at a rate of its own, always with the same wrong result. The rates are
{rates}, in shares {shares}.
{world.context_share:.0%} of the texts show a solution in the context first; the completion repeats it,
{world.terse_share:.0%} of these tersely (the boxed answer alone).

It cannot do anything else, and is of no use outside OGLS-SD.
"""
