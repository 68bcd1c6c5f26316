"""Specifications of the machines that `ogls plan` supports.

From NVIDIA's data sheets of L40S, A100 (SXM), H100 (SXM) and H200 (SXM), and the white paper of the Ada architecture
(GeForce RTX 4090): dense 16-bit matrix products with fp32 accumulation, and fp32 outside the tensor cores. torch does
not use TF32 unless a program allows it, and this one does not. A link is NVLink, or PCIe 4.0 x16.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
UTILIZATION = 0.4  # fraction of peak FLOP/s that dense passes reach


@dataclass(frozen=True)
class Gpu:
    """A GPU, or the CPU."""

    name: str
    flops: float  # peak FLOP/s; on GPUs of 16-bit matrix products
    fp32: float  # peak FLOP/s of fp32 matrix products
    bandwidth: float  # memory bandwidth in bytes/s
    memory: float  # memory size in bytes
    link: float  # bytes/s to another GPU of the same node, in one direction

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s that dense passes with numbers of a type reach."""
        return UTILIZATION * (self.fp32 if dtype == "float32" else self.flops)


GPUS = {
    g.name: g
    for g in (
        Gpu("rtx4090", 165e12, 82.6e12, 1.0e12, 24 * GIB, 32e9),
        Gpu("l40s", 362e12, 91.6e12, 0.86e12, 48 * GIB, 32e9),
        Gpu("a100-40", 312e12, 19.5e12, 1.55e12, 40 * GIB, 300e9),
        Gpu("a100-80", 312e12, 19.5e12, 2.0e12, 80 * GIB, 300e9),
        Gpu("h100", 989e12, 67e12, 3.35e12, 80 * GIB, 450e9),
        Gpu("h200", 989e12, 67e12, 4.8e12, 141 * GIB, 450e9),
        Gpu("cpu", 0.1e12, 0.1e12, 20e9, 16 * GIB, 20e9),
    )
}
