"""The time of the teacher pass and of a training step compared with their theoretical minimum.

    python tests/benchmarks/floor.py OUT [TOKENS [DTYPE]]

The model has the shape of Qwen3-1.7B and random weights. TOKENS is the length of a rollout (default 64; use 1024 and
bfloat16 on a GPU). The minimum (floor) is the larger of two times: the operations divided by the rate of a large matrix
product, and the bytes of the weights divided by the rate of a large copy. Both rates are measured on the same device in
the same run. Utilization is the floor divided by the measured time. For a GPU that `ogls plan` knows, the model FLOPs
utilization (MFU) of the peak in its data sheet is given too. Peak memory is compared with the estimate of `ogls plan`.
Writes OUT/floor.md and .parquet.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = ["tests"]

from measured import device_name, median_seconds, peak_bytes, peak_flops, write_results
from randommodel import QWEN3_1_7B, random_model
from workloads import teacher_pass, training_step

GROUP, PROMPT = 4, 32
EXEMPLAR = 4  # length of an exemplar, in rollout lengths


def main(out: Path, tokens: int, dtype: str) -> None:
    """Measure both parts with rollouts of `tokens` tokens, and write the results."""
    from ogls.config import build_config
    from ogls.models.policy import Policy
    from ogls.models.shape import read_shape

    with tempfile.TemporaryDirectory() as folder:
        path = random_model(Path(folder) / "model", dtype, **QWEN3_1_7B)
        prefix = PROMPT + EXEMPLAR * tokens
        sizes = {"micro_batch_tokens": GROUP * (tokens + PROMPT)}
        data = {"evaluate": {"benchmarks": [{}]}, "model": {"path": str(path), "dtype": dtype}, "train": sizes}
        config = build_config(data | {"adapter": {"rank": 64}, "teacher": {"batch_tokens": GROUP * prefix}})
        policy, shape = Policy(config.model, config.adapter), read_shape(config)
    rates = flop_rate(policy), copy_rate(policy)
    print(f"{rates[0] / 1e12:.2f} TFLOP/s, {rates[1] / 1e9:.0f} GB/s on {device_name()}", flush=True)
    rows = []
    workloads = {
        "teacher pass": teacher_pass(policy, config, shape, GROUP, tokens, prefix),
        "training step": training_step(policy, config, shape, GROUP, PROMPT, tokens),
    }
    peak_rate = None if dtype == "float32" else peak_flops(device_name())
    for name, work in workloads.items():
        work.call()  # warm-up: allocates buffers, tunes kernels
        measured, peak = median_seconds(work.call), peak_bytes(work.call)
        floor = max(work.flop / rates[0], work.passes * weight_bytes(policy) / rates[1])
        mfu = work.flop / measured / peak_rate if peak_rate else None
        rows.append(
            {
                "part": name,
                "device": device_name(),
                "dtype": dtype,
                "tflop": work.flop / 1e12,
                "floor": floor,
                "seconds": measured,
                "reached": floor / measured,
                "mfu": mfu,
                "peak_gib": peak / 2**30,
                "planned_gib": work.planned / 2**30,
            }
        )
    columns = {
        "part": (f"at Qwen3-1.7B's shape, {dtype}, {rows[0]['device']}", ""),
        "tflop": ("TFLOP", ".1f"),
        "floor": ("floor, s", ".2f"),
        "seconds": ("seconds", ".2f"),
        "reached": ("floor / measured", ".2f"),
        "mfu": ("MFU", ".2f"),
        "peak_gib": ("peak GiB beyond the model", ".2f"),
        "planned_gib": ("planned", ".2f"),
    }
    write_results(out, "floor", rows, columns)


def weight_bytes(policy: Any) -> float:
    """Bytes of all parameters of the model."""
    return float(sum(p.numel() * p.element_size() for p in policy.model.parameters()))


def flop_rate(policy: Any, size: int = 4096) -> float:
    """FLOP/s of a square matrix product in the dtype of the model."""
    a, b = (torch.randn(size, size, device=policy.device).to(policy.head.dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b)


def copy_rate(policy: Any, size: int = 2**28) -> float:
    """Bytes/s of a copy, counting bytes read and bytes written."""
    a = torch.zeros(size, device=policy.device)
    b = torch.zeros_like(a)
    return 2 * a.numel() * a.element_size() / best_seconds(lambda: b.copy_(a))


def best_seconds(call: Any) -> float:
    """The shortest of six calls, in seconds."""
    return min(median_seconds(call, 1) for _ in range(6))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["64"])[0]), (sys.argv[3:] or ["float32"])[0])
