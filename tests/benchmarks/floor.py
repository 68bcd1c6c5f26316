"""The teacher pass and a training step at Qwen3-1.7B's shape with random weights, against the least time they can take.

    python tests/benchmarks/floor.py OUT [TOKENS [DTYPE]]

TOKENS is the length of a rollout (64; take 1024 and bfloat16 on a GPU). The floor is computed first: the larger of the
operations over the rate of a large matrix product, and the bytes of the weights over the rate of a large copy, both
measured on the same device in the same run. Utilisation is the floor's time over the measured one; where the GPU is
known to `ogls plan`, it is given of the peak that its maker states as well (MFU). Memory is held against `ogls plan`.
Writes OUT/floor.md and .parquet.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = ["tests"]

from measured import peak_bytes, publish, seconds
from randommodel import QWEN3_1_7B, random_model

GROUP, PROMPT, SUPPORT = 4, 32, 64
EXEMPLAR = 4  # times a rollout's length


def main(out: Path, tokens: int, dtype: str) -> None:
    from ogls.config import build_config
    from ogls.models.policy import Policy
    from ogls.models.shape import read_shape

    with tempfile.TemporaryDirectory() as folder:
        path = random_model(Path(folder) / "model", dtype, **QWEN3_1_7B)
        sizes = {"micro_batch_tokens": GROUP * (tokens + PROMPT)}
        data = {"evaluate": {"benchmarks": [{}]}, "model": {"path": str(path), "dtype": dtype}, "train": sizes}
        config = build_config(data | {"adapter": {"rank": 64}})
        policy, shape = Policy(config.model, config.adapter), read_shape(config)
    rates = flop_rate(policy), copy_rate(policy)
    print(f"{rates[0] / 1e12:.2f} TFLOP/s, {rates[1] / 1e9:.0f} GB/s on {device_name(policy)}", flush=True)
    rows = []
    for name, measured in (("teacher pass", teaching), ("training step", training)):
        flop, read, call, planned = measured(policy, config, shape, tokens)
        call()  # buffers, autotuning
        took, peak = seconds(call), peak_bytes(call)
        floor = max(flop / rates[0], read / rates[1])
        stated = flop / took / stated_rate(policy) if stated_rate(policy) else None
        rows.append(
            {
                "part": name,
                "device": device_name(policy),
                "dtype": dtype,
                "tflop": flop / 1e12,
                "floor": floor,
                "seconds": took,
                "reached": floor / took,
                "mfu": stated,
                "peak_gib": peak / 2**30,
                "planned_gib": planned / 2**30,
            }
        )
    shown = {
        "part": (f"at Qwen3-1.7B's shape, {dtype}, {rows[0]['device']}", ""),
        "tflop": ("TFLOP", ".1f"),
        "floor": ("floor, s", ".2f"),
        "seconds": ("seconds", ".2f"),
        "reached": ("floor / measured", ".2f"),
        "mfu": ("MFU", ".2f"),
        "peak_gib": ("peak GiB beyond the model", ".2f"),
        "planned_gib": ("planned", ".2f"),
    }
    publish(out, "floor", rows, shown)


def teaching(policy: Any, config: Any, shape: Any, tokens: int) -> tuple[float, float, Any, float]:
    """Operations, bytes, the call, and the memory planned, of scoring a group by each other's rollouts."""
    from ogls.distillation.exemplars import Context, ScoredRollout
    from ogls.distillation.teacher import score_rollouts
    from ogls.planning.plan import teaching_bytes

    prefix = PROMPT + EXEMPLAR * tokens
    contexts = [Context("teacher", drawn(prefix)) for _ in range(GROUP)]
    rollouts = [drawn(tokens) for _ in range(GROUP)]
    scored = [
        ScoredRollout(
            ("p", j), "correct", rollouts[j], tuple((c, 1 / (GROUP - 1)) for c in contexts if c is not contexts[j]), ()
        )
        for j in range(GROUP)
    ]
    pairs = GROUP * (GROUP - 1)
    batch = GROUP * prefix
    run = GROUP * prefix + pairs * (tokens - 1)
    keys = GROUP * prefix * prefix / 2 + pairs * (tokens - 1) * (prefix + tokens / 2)
    flop = 2 * shape.body * run + 4 * shape.layers * shape.heads * shape.head_dim * keys
    passes = 1 + -(-pairs // max(1, batch // (prefix + tokens)))
    sized = config.model_copy(update={"teacher": config.teacher.model_copy(update={"batch_tokens": batch})})
    planned = teaching_bytes(sized, shape)
    return flop, passes * weights(policy), lambda: score_rollouts(policy, scored, batch), planned


def training(policy: Any, config: Any, shape: Any, tokens: int) -> tuple[float, float, Any, float]:
    """The same of one optimizer step on a group's rollouts, on a support of 64 tokens."""
    from ogls.planning.plan import training_bytes
    from ogls.training.batching import TrainItem
    from ogls.training.trainer import Trainer

    items = []
    for i in range(GROUP):
        ids = torch.stack([torch.randperm(shape.vocabulary)[:SUPPORT] for _ in range(tokens)])
        target = {"ids": ids, "logprobs": torch.randn(tokens, SUPPORT).log_softmax(-1)}
        tail = torch.full((tokens,), 1e-3)
        items.append(TrainItem(("p", i), drawn(PROMPT), drawn(tokens), tokens, 0, **target, tail_mass=tail))
    trainer = Trainer(policy, config.train)
    run, length = GROUP * (tokens + PROMPT), tokens + PROMPT
    # Forward, and backward through frozen weights: twice 2 P. LoRA's own products are forward and twice that backward.
    flop = 4 * shape.body * run + 6 * shape.trained * run
    flop += 3 * 4 * shape.layers * shape.heads * shape.head_dim * GROUP * length * length / 2
    flop += 4 * shape.vocabulary * shape.hidden * GROUP * tokens
    already = 12 * shape.trained  # the adapter and AdamW's state, there before the step that is measured
    return flop, 2 * weights(policy), lambda: trainer.optimizer_step(items), training_bytes(config, shape) - already


def drawn(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, QWEN3_1_7B["vocab_size"], (count,)).tolist())


def weights(policy: Any) -> float:
    return float(sum(p.numel() * p.element_size() for p in policy.model.parameters()))


def flop_rate(policy: Any, size: int = 4096) -> float:
    """FLOP/s of a square matrix product in the model's type."""
    a, b = (torch.randn(size, size, device=policy.device).to(policy.head.dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, policy)


def copy_rate(policy: Any, size: int = 2**28) -> float:
    """Bytes/s of a copy, read and written."""
    a = torch.zeros(size, device=policy.device)
    b = torch.zeros_like(a)
    return 2 * a.numel() * a.element_size() / best(lambda: b.copy_(a), policy)


def best(call: Any, policy: Any) -> float:
    def run() -> None:
        call()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()

    return min(seconds(run, 1) for _ in range(6))


def device_name(policy: Any) -> str:
    if policy.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def stated_rate(policy: Any) -> float | None:
    """The peak that its maker states for 16-bit products, if `ogls plan` knows the device."""
    from ogls.planning.gpus import GPUS

    name = device_name(policy).lower().replace(" ", "")
    known = [gpu.flops for gpu in GPUS.values() if gpu.name != "cpu" and gpu.name.split("-")[0] in name]
    return known[0] if known and policy.head.dtype != torch.float32 else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["64"])[0]), (sys.argv[3:] or ["float32"])[0])
