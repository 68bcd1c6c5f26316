"""The teacher pass with shared prefixes compared with full sequences; size, speed and error of the cached states.

    python tests/benchmarks/teacher.py OUT

1. Teacher pass: a group of 8 rollouts, each the exemplar of the 7 others; exemplars are 8 times as long as the scored
   tokens; a random model with the Qwen3 architecture. All ways give the same states; with shared prefixes, their keys
   and values are copied layer by layer, or for all layers at once.
2. Cache: bytes per token, and tokens written and read per second, at the hidden size and vocabulary of Qwen3-1.7B.
3. Error: KL between targets steered from exact states and from stored states of each dtype, on the tiny world.

Writes OUT/teacher_{pass,cache,error}.md and .parquet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = ["tests"]

from measured import median_seconds, peak_bytes, write_results
from randommodel import QWEN3_1_7B, random_model

GROUP, TARGET, EXEMPLAR, BATCH, LAYERS = 8, 64, 512, 16384, 12
VOCABULARY, WIDTH = QWEN3_1_7B["vocab_size"], QWEN3_1_7B["hidden_size"]
POOLS, CONTEXTS, TOP_K, TOKENS = 3, 14, 128, 64  # 14 contexts per token: 7 correct, 7 incorrect


def main(out: Path) -> None:
    """Run the three measurements, and write their results."""
    measure_prefixes(out)
    measure_cache(out)
    measure_errors(out)


def measure_prefixes(out: Path) -> None:
    """Tokens and seconds of the teacher pass with full sequences and with shared prefixes."""
    from ogls.config import AdapterConfig, ModelConfig
    from ogls.distillation import exemplars, teacher
    from ogls.models import continuation
    from ogls.models.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", num_hidden_layers=LAYERS)
        policy = Policy(ModelConfig(path=str(model)), AdapterConfig(rank=4))
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())

    contexts = [exemplars.Context("frozen", random_tokens(EXEMPLAR + 64)) for _ in range(GROUP)]
    rollouts = [random_tokens(TARGET) for _ in range(GROUP)]
    scored = [
        exemplars.ScoredRollout((f"p{i}", j), "correct", rollouts[j], ((contexts[i], 1.0),), (i,))
        for i in range(GROUP)
        for j in range(GROUP)
        if i != j
    ]

    def full() -> dict[Any, torch.Tensor]:
        states_by_rollout: dict[Any, torch.Tensor] = {}
        step = BATCH // (EXEMPLAR + 64 + TARGET)
        with torch.inference_mode():
            for start in range(0, len(scored), step):
                part = scored[start : start + step]
                ids = torch.tensor([[*s.shares[0][0].prompt_ids, *s.token_ids[:-1]] for s in part])
                states = policy.run_body(ids, torch.ones_like(ids)).last_hidden_state
                states_by_rollout |= {(s.key, s.pool): h[-TARGET:] for s, h in zip(part, states, strict=True)}
        return states_by_rollout

    def shared() -> dict[Any, torch.Tensor]:
        return teacher.score_rollouts(policy, scored, BATCH)

    def copied() -> dict[Any, torch.Tensor]:
        with mock.patch.object(continuation, "_share", _copy_all):
            return shared()

    assert all(torch.equal(a, b) for a, b in zip(shared().values(), copied().values(), strict=True))
    shared_states, full_states = shared(), full()
    max_error = max((shared_states[key] - full_states[key]).abs().max().item() for key in full_states)
    assert max_error < 1e-3, max_error
    ways = {full: "one full sequence a context", copied: "shared prefixes, all layers", shared: "shared prefixes"}
    seconds = {way: median_seconds(way) for way in ways}
    tokens = dict.fromkeys(ways, GROUP * (EXEMPLAR + 64) + len(scored) * TARGET)
    tokens[full] = len(scored) * (EXEMPLAR + 64 + TARGET)
    rows = [
        {
            "way": name,
            "tokens": tokens[way],
            "seconds": seconds[way],
            "fewer": tokens[full] / tokens[way],
            "faster": seconds[full] / seconds[way],
            "peak_mib": peak_bytes(way) / 2**20,
        }
        for way, name in ways.items()
    ]
    table_columns = {
        "way": ("teacher pass of a group", ""),
        "tokens": ("tokens", ",d"),
        "seconds": ("seconds", ".2f"),
        "fewer": ("times fewer tokens", ".1f"),
        "faster": ("times less time", ".1f"),
        "peak_mib": ("peak MiB", ",.0f"),
    }
    write_results(out, "teacher_pass", rows, table_columns)


def _copy_all(prefixes: Sequence[Any], rows: torch.Tensor) -> list[Any]:
    """What `continuation._share` gives, with the copies of all layers in memory together."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, layer in enumerate(prefixes):
        cache.update(layer.keys[rows], layer.values[rows], number)
    return cache.layers


def measure_cache(out: Path) -> None:
    """Bytes per distilled token on disk, and tokens per second written to and read from Parquet.

    States are stored as bytes (`columns.pack_states`). The two alternatives are stored as plain binary columns too, so
    that only the content differs: averaged logits, and the top ids and log-probs of each context.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ogls.stages import columns

    generator = torch.Generator().manual_seed(0)

    def states() -> list[dict[str, Any]]:
        hidden = torch.randn(TOKENS, WIDTH, generator=generator)
        return [columns.pack_states(hidden, "float16") for _ in range(POOLS)]

    def logits() -> list[dict[str, Any]]:
        content = torch.randn(TOKENS, VOCABULARY, generator=generator).half().numpy().tobytes()
        return [{"logits": content} for _ in range(POOLS)]

    def top_k_lists() -> list[dict[str, Any]]:
        ids = torch.randint(0, VOCABULARY, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)
        values = torch.randn(TOKENS, TOP_K, generator=generator).half()
        return [{"ids": ids.numpy().tobytes(), "values": values.numpy().tobytes()} for _ in range(CONTEXTS)]

    rows = []
    forms = {
        "averaged states, fp16": states,
        "averaged logits, fp16": logits,
        "top-128 lists of 14 contexts (their mean is not exact)": top_k_lists,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            path, table = Path(folder) / "form.parquet", pa.Table.from_pylist(form())
            write = median_seconds(
                lambda t=table, p=path: pq.write_table(t, p, compression="NONE", use_dictionary=False), 9
            )
            read = median_seconds(lambda p=path: pq.read_table(p, memory_map=False), 9)
            size = path.stat().st_size / TOKENS
            rows.append({"form": name, "bytes": size, "written": TOKENS / write, "read": TOKENS / read})
    for row in rows:
        row["larger"] = row["bytes"] / rows[0]["bytes"]
    table_columns = {
        "form": ("cache of a token, three pools", ""),
        "bytes": ("bytes", ",.0f"),
        "larger": ("times the states", ".1f"),
        "written": ("tokens/s written", ",.0f"),
        "read": ("tokens/s read", ",.0f"),
    }
    write_results(out, "teacher_cache", rows, table_columns)


def measure_errors(out: Path) -> None:
    """KL(exact target || target from stored states), in nats per token, on a round of the tiny world."""
    from conftest import carry_out, small_config

    from ogls.distillation.steering import combine_states
    from ogls.models.load import load_head
    from ogls.stages.groups import cached_rollouts

    with tempfile.TemporaryDirectory() as folder:
        run = carry_out(small_config(folder, "teacher.state_dtype=float32"), rounds=1)
        head, recipe = load_head(run.config.model), run.config.steer.to_recipe()
        kl_parts: dict[str, list[torch.Tensor]] = {}
        for _, _, states in cached_rollouts(run, 1, head.device):
            exact = (combine_states(states, recipe) @ head.T).log_softmax(-1)
            for dtype in ("float32", "float16", "bfloat16"):
                stored_states = {p: s.to(getattr(torch, dtype)) for p, s in states.items()}
                stored = (combine_states(stored_states, recipe) @ head.T).log_softmax(-1)
                kl_parts.setdefault(dtype, []).append((exact.exp() * (exact - stored)).sum(-1))
    kls = {dtype: torch.cat(parts).clamp(min=0) for dtype, parts in kl_parts.items()}
    rows = [{"type": dtype, "mean": kl.mean().item(), "largest": kl.max().item()} for dtype, kl in kls.items()]
    table_columns = {
        "type": ("type of states", ""),
        "mean": ("mean KL, nats a token", ".1e"),
        "largest": ("largest", ".1e"),
    }
    write_results(out, "teacher_error", rows, table_columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
