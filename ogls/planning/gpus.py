"""Specifications of the machines that `ogls plan` supports: FLOP/s, memory bandwidth and memory size."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU, or the CPU."""

    name: str
    flops: float  # peak dense FLOP/s; on GPUs in bfloat16
    bandwidth: float  # memory bandwidth in bytes/s
    memory: float  # memory size in bytes


GPUS = {
    g.name: g
    for g in (
        Gpu("rtx4090", 165e12, 1.0e12, 24 * GIB),
        Gpu("l40s", 362e12, 0.86e12, 48 * GIB),
        Gpu("a100-40", 312e12, 1.55e12, 40 * GIB),
        Gpu("a100-80", 312e12, 2.0e12, 80 * GIB),
        Gpu("h100", 989e12, 3.35e12, 80 * GIB),
        Gpu("h200", 989e12, 4.8e12, 141 * GIB),
        Gpu("cpu", 0.1e12, 20e9, 16 * GIB),
    )
}
