"""The teacher pass with shared prefixes against one full sequence a context; the cache's size, rates and error.

    python tests/benchmarks/teacher.py OUT

A group of 8 rollouts, each the exemplar of the 7 others; exemplars 8 times as long as what is scored; a random model of
Qwen3's shape. Both ways give the same states. Then what a token takes in the cache, and how fast it is written and read
in each form, at Qwen3-1.7B's width and vocabulary. Then the type of cached states: KL between the targets steered from
exact states and from stored ones, on the tiny world. Writes OUT/teacher_{pass,cache,error}.md and .parquet.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = ["tests"]

from measured import publish, seconds
from randommodel import QWEN3_1_7B, random_model

GROUP, TARGET, EXEMPLAR, BATCH = 8, 64, 512, 16384
VOCABULARY, WIDTH = QWEN3_1_7B["vocab_size"], QWEN3_1_7B["hidden_size"]
POOLS, CONTEXTS, LISTED, TOKENS = 3, 14, 128, 64  # 14 contexts a token: 7 of each pool; 64 tokens of each form


def main(out: Path) -> None:
    prefixes(out)
    cache(out)
    errors(out)


def prefixes(out: Path) -> None:
    """Tokens and time of both ways."""
    from ogls.config import AdapterConfig, ModelConfig
    from ogls.distillation import exemplars, teacher
    from ogls.models.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(ModelConfig(path=str(random_model(Path(folder) / "model"))), AdapterConfig(rank=4))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())

    contexts = [exemplars.Context("teacher", draw(EXEMPLAR + 64)) for _ in range(GROUP)]
    rollouts = [draw(TARGET) for _ in range(GROUP)]
    scored = [
        exemplars.ScoredRollout((f"p{i}", j), "correct", rollouts[j], ((contexts[i], 1.0),), (i,))
        for i in range(GROUP)
        for j in range(GROUP)
        if i != j
    ]

    def full() -> dict[Any, torch.Tensor]:
        found: dict[Any, torch.Tensor] = {}
        step = BATCH // (EXEMPLAR + 64 + TARGET)
        with torch.inference_mode():
            for start in range(0, len(scored), step):
                part = scored[start : start + step]
                ids = torch.tensor([[*s.shares[0][0].prompt_ids, *s.token_ids[:-1]] for s in part])
                states = policy.run_body(ids, torch.ones_like(ids)).last_hidden_state
                found |= {(s.key, s.pool): h[-TARGET:] for s, h in zip(part, states, strict=True)}
        return found

    def shared() -> dict[Any, torch.Tensor]:
        return teacher.score_rollouts(policy, scored, BATCH)

    ours, theirs = shared(), full()
    worst = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
    assert worst < 1e-3, worst
    took = {way: seconds(way) for way in (full, shared)}
    tokens = {full: len(scored) * (EXEMPLAR + 64 + TARGET), shared: GROUP * (EXEMPLAR + 64) + len(scored) * TARGET}
    rows = [
        {
            "way": name,
            "tokens": tokens[way],
            "seconds": took[way],
            "fewer": tokens[full] / tokens[way],
            "faster": took[full] / took[way],
        }
        for way, name in ((full, "one full sequence a context"), (shared, "shared prefixes"))
    ]
    shown = {
        "way": ("teacher pass of a group", ""),
        "tokens": ("tokens", ",d"),
        "seconds": ("seconds", ".2f"),
        "fewer": ("times fewer tokens", ".1f"),
        "faster": ("times less time", ".1f"),
    }
    publish(out, "teacher_pass", rows, shown)


def cache(out: Path) -> None:
    """What a distilled token takes on disk, and tokens a second written to and read from Parquet.

    States are kept as bytes (`columns.pack_states`). The two alternatives are written as plain binary columns too, so
    that all that differs is what there is to write: averaged logits, and lists of ids and log-probs of each context.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ogls.stages import columns

    generator = torch.Generator().manual_seed(0)

    def states() -> list[dict[str, Any]]:
        drawn = torch.randn(TOKENS, WIDTH, generator=generator)
        return [columns.pack_states(drawn, "float16") for _ in range(POOLS)]

    def logits() -> list[dict[str, Any]]:
        drawn = torch.randn(TOKENS, VOCABULARY, generator=generator).half().numpy().tobytes()
        return [{"logits": drawn} for _ in range(POOLS)]

    def lists() -> list[dict[str, Any]]:
        ids = torch.randint(0, VOCABULARY, (TOKENS, LISTED), generator=generator, dtype=torch.int32)
        values = torch.randn(TOKENS, LISTED, generator=generator).half()
        return [{"ids": ids.numpy().tobytes(), "values": values.numpy().tobytes()} for _ in range(CONTEXTS)]

    rows = []
    forms = {
        "averaged states, fp16": states,
        "averaged logits, fp16": logits,
        "top-128 lists of 14 contexts (their mean is not exact)": lists,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            path, table = Path(folder) / "form.parquet", pa.Table.from_pylist(form())
            write = seconds(lambda t=table, p=path: pq.write_table(t, p, compression="NONE", use_dictionary=False), 9)
            read = seconds(lambda p=path: pq.read_table(p, memory_map=False), 9)
            size = path.stat().st_size / TOKENS
            rows.append({"form": name, "bytes": size, "written": TOKENS / write, "read": TOKENS / read})
    for row in rows:
        row["larger"] = row["bytes"] / rows[0]["bytes"]
    shown = {
        "form": ("cache of a token, three pools", ""),
        "bytes": ("bytes", ",.0f"),
        "larger": ("times the states", ".1f"),
        "written": ("tokens/s written", ",.0f"),
        "read": ("tokens/s read", ",.0f"),
    }
    publish(out, "teacher_cache", rows, shown)


def errors(out: Path) -> None:
    """KL(exact target || target from stored states), nats a token, on a round of the tiny world."""
    from conftest import carry_out, small_config

    from ogls.distillation.steering import combine_states
    from ogls.models.load import load_head
    from ogls.stages.groups import cached_rollouts

    with tempfile.TemporaryDirectory() as folder:
        run = carry_out(small_config(folder, "teacher.state_dtype=float32"), rounds=1)
        head, recipe = load_head(run.config.model), run.config.steer.to_recipe()
        found: dict[str, list[torch.Tensor]] = {}
        for _, _, states in cached_rollouts(run, 1, head.device):
            exact = (combine_states(states, recipe) @ head.T).log_softmax(-1)
            for kind in ("float32", "float16", "bfloat16"):
                kept = {p: s.to(getattr(torch, kind)) for p, s in states.items()}
                stored = (combine_states(kept, recipe) @ head.T).log_softmax(-1)
                found.setdefault(kind, []).append((exact.exp() * (exact - stored)).sum(-1))
    kls = {kind: torch.cat(parts).clamp(min=0) for kind, parts in found.items()}
    rows = [{"type": kind, "mean": kl.mean().item(), "largest": kl.max().item()} for kind, kl in kls.items()]
    shown = {"type": ("type of states", ""), "mean": ("mean KL, nats a token", ".1e"), "largest": ("largest", ".1e")}
    publish(out, "teacher_error", rows, shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
