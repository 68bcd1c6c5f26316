"""The teacher pass with shared prefixes against one full sequence a context, and the cache's size and error.

    python tests/benchmarks/teacher.py OUT

A group of 8 rollouts, each the exemplar of the 7 others; exemplars 8 times as long as what is scored; a random model of
Qwen3's shape. Both ways give the same states. Then the type of cached states: KL between the targets steered from exact
states and from stored ones, on the tiny world. Writes OUT/teacher.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = ["tests", "tests/benchmarks"]

GROUP, TARGET, EXEMPLAR, BATCH = 8, 64, 512, 16384
VOCABULARY, WIDTH, POOLS = 151_936, 2048, 3  # Qwen3-1.7B's, for the cache's size


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "teacher.md").write_text("\n\n".join([prefixes(), sizes(), errors()]) + "\n")
    print((out / "teacher.md").read_text())


def prefixes() -> str:
    """Tokens and time of both ways."""
    from training import build

    from ogls import teacher
    from ogls.config import AdapterConfig, ModelConfig
    from ogls.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "model", vocabulary=320)
        policy = Policy(ModelConfig(path=str(Path(folder) / "model")), AdapterConfig(rank=4))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())

    contexts = [teacher.Context("teacher", draw(EXEMPLAR + 64)) for _ in range(GROUP)]
    rollouts = [draw(TARGET) for _ in range(GROUP)]
    scored = [
        teacher.Scored((f"p{i}", j), "correct", rollouts[j], ((contexts[i], 1.0),), (i,))
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
                states = policy.hidden(ids, torch.ones_like(ids)).last_hidden_state
                found |= {(s.key, s.pool): h[-TARGET:] for s, h in zip(part, states, strict=True)}
        return found

    def shared() -> dict[Any, torch.Tensor]:
        return teacher.score(policy, scored, BATCH)

    ours, theirs = shared(), full()
    worst = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
    assert worst < 1e-3, worst
    seconds = {way.__name__: timed(way) for way in (shared, full)}
    tokens = {"shared": GROUP * (EXEMPLAR + 64) + len(scored) * TARGET, "full": len(scored) * (EXEMPLAR + 64 + TARGET)}
    lines = ["| teacher pass of a group | tokens | seconds | tokens saved | time saved |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for way, name in (("full", "one full sequence a context"), ("shared", "shared prefixes")):
        saved = tokens["full"] / tokens[way], seconds["full"] / seconds[way]
        lines.append(f"| {name} | {tokens[way]:,} | {seconds[way]:.2f} | {saved[0]:.1f} x | {saved[1]:.1f} x |")
    return "\n".join(lines)


def timed(way: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        way()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def sizes() -> str:
    """Bytes a distilled token, at Qwen3-1.7B's shape and three pools."""
    state, logits, lists = POOLS * WIDTH * 2, POOLS * VOCABULARY * 2, 14 * 128 * (4 + 2)
    lines = ["| cache of a token, three pools | bytes | against states |", "| --- | ---: | ---: |"]
    for name, size in (
        ("averaged states, fp16", state),
        ("averaged logits, fp16", logits),
        ("top-128 lists of 14 contexts (their mean is not exact)", lists),
    ):
        lines.append(f"| {name} | {size:,} | {size / state:.1f} x |")
    return "\n".join(lines)


def errors() -> str:
    """KL(exact target || target from stored states), nats a token, on a round of the tiny world."""
    from conftest import carry_out, small_config

    from ogls.policy import load_head
    from ogls.stages.common import cached_rollouts
    from ogls.steering import combine

    with tempfile.TemporaryDirectory() as folder:
        run = carry_out(small_config(folder, "teacher.state_dtype=float32"), rounds=1)
        head, recipe = load_head(run.config.model), run.config.steer.resolved()
        found: dict[str, list[torch.Tensor]] = {}
        for _, _, states in cached_rollouts(run, 1, head.device):
            exact = (combine(states, recipe) @ head.T).log_softmax(-1)
            for kind in ("float32", "float16", "bfloat16"):
                kept = {p: s.to(getattr(torch, kind)) for p, s in states.items()}
                stored = (combine(kept, recipe) @ head.T).log_softmax(-1)
                found.setdefault(kind, []).append((exact.exp() * (exact - stored)).sum(-1))
    lines = ["| type of states | mean KL, nats a token | largest |", "| --- | ---: | ---: |"]
    for kind, parts in found.items():
        kl = torch.cat(parts).clamp(min=0)
        lines.append(f"| {kind} | {kl.mean().item():.1e} | {kl.max().item():.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
