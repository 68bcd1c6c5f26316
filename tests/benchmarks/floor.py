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

from measured import median_seconds, peak_bytes, write_results
from randommodel import QWEN3_1_7B, random_model

GROUP, PROMPT, SUPPORT = 4, 32, 64
EXEMPLAR = 4  # length of an exemplar, in rollout lengths


def main(out: Path, tokens: int, dtype: str) -> None:
    """Measure both parts with rollouts of `tokens` tokens, and write the results."""
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
    for name, workload in (("teacher pass", teacher_pass), ("training step", training_step)):
        flop, read, call, planned = workload(policy, config, shape, tokens)
        call()  # warm-up: allocates buffers, tunes kernels
        measured, peak = median_seconds(call), peak_bytes(call)
        floor = max(flop / rates[0], read / rates[1])
        mfu = flop / measured / peak_rate(policy) if peak_rate(policy) else None
        rows.append(
            {
                "part": name,
                "device": device_name(policy),
                "dtype": dtype,
                "tflop": flop / 1e12,
                "floor": floor,
                "seconds": measured,
                "reached": floor / measured,
                "mfu": mfu,
                "peak_gib": peak / 2**30,
                "planned_gib": planned / 2**30,
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


def teacher_pass(policy: Any, config: Any, shape: Any, tokens: int) -> tuple[float, float, Any, float]:
    """Scoring the rollouts of a group with each other as exemplars.

    Returns (floating point operations, bytes of weights read, the call to measure, planned memory in bytes).
    """
    from ogls.distillation.exemplars import Context, ScoredRollout
    from ogls.distillation.teacher import score_rollouts
    from ogls.planning.memory import teaching_bytes

    prefix = PROMPT + EXEMPLAR * tokens
    contexts = [Context("frozen", random_tokens(prefix)) for _ in range(GROUP)]
    rollouts = [random_tokens(tokens) for _ in range(GROUP)]
    scored = [
        ScoredRollout(
            ("p", j), "correct", rollouts[j], tuple((c, 1 / (GROUP - 1)) for c in contexts if c is not contexts[j]), ()
        )
        for j in range(GROUP)
    ]
    pairs = GROUP * (GROUP - 1)
    batch = GROUP * prefix
    positions = GROUP * prefix + pairs * (tokens - 1)
    keys = GROUP * prefix * prefix / 2 + pairs * (tokens - 1) * (prefix + tokens / 2)
    flop = 2 * shape.body * positions + 4 * shape.layers * shape.heads * shape.head_dim * keys
    passes = 1 + -(-pairs // max(1, batch // (prefix + tokens)))
    planned_config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"batch_tokens": batch})})
    planned = teaching_bytes(planned_config, shape)
    return flop, passes * weight_bytes(policy), lambda: score_rollouts(policy, scored, batch), planned


def training_step(policy: Any, config: Any, shape: Any, tokens: int) -> tuple[float, float, Any, float]:
    """One optimizer step on the rollouts of a group, with targets on 64 tokens. Returns the same as `teacher_pass`."""
    from ogls.planning.memory import training_bytes
    from ogls.training.batching import TrainItem
    from ogls.training.trainer import Trainer

    items = []
    for i in range(GROUP):
        ids = torch.stack([torch.randperm(shape.vocabulary)[:SUPPORT] for _ in range(tokens)])
        target = {"ids": ids, "logprobs": torch.randn(tokens, SUPPORT).log_softmax(-1)}
        tail = torch.full((tokens,), 1e-3)
        prompt, completion = random_tokens(PROMPT), random_tokens(tokens)
        items.append(TrainItem(("p", i), prompt, completion, tokens, 0, **target, tail_mass=tail))
    trainer = Trainer(policy, config.train)
    positions, length = GROUP * (tokens + PROMPT), tokens + PROMPT
    # Frozen weights: 2 P operations forward, 2 P backward. LoRA weights: 2 P forward, 4 P backward.
    flop = 4 * shape.body * positions + 6 * shape.trained * positions
    flop += 3 * 4 * shape.layers * shape.heads * shape.head_dim * GROUP * length * length / 2
    flop += 4 * shape.vocabulary * shape.hidden * GROUP * tokens
    # The adapter and the state of AdamW exist before the measured step.
    planned = training_bytes(config, shape) - 12 * shape.trained
    return flop, 2 * weight_bytes(policy), lambda: trainer.optimizer_step(items), planned


def random_tokens(count: int) -> tuple[int, ...]:
    """Random token ids without the three special tokens of the tokenizer."""
    return tuple(torch.randint(3, QWEN3_1_7B["vocab_size"], (count,)).tolist())


def weight_bytes(policy: Any) -> float:
    """Bytes of all parameters of the model."""
    return float(sum(p.numel() * p.element_size() for p in policy.model.parameters()))


def flop_rate(policy: Any, size: int = 4096) -> float:
    """FLOP/s of a square matrix product in the dtype of the model."""
    a, b = (torch.randn(size, size, device=policy.device).to(policy.head.dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, policy)


def copy_rate(policy: Any, size: int = 2**28) -> float:
    """Bytes/s of a copy, counting bytes read and bytes written."""
    a = torch.zeros(size, device=policy.device)
    b = torch.zeros_like(a)
    return 2 * a.numel() * a.element_size() / best_seconds(lambda: b.copy_(a), policy)


def best_seconds(call: Any, policy: Any) -> float:
    """The shortest of six calls, in seconds."""

    def run() -> None:
        call()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()

    return min(median_seconds(run, 1) for _ in range(6))


def device_name(policy: Any) -> str:
    """The name of the GPU, or the number of CPU threads."""
    if policy.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_rate(policy: Any) -> float | None:
    """The peak FLOP/s of 16-bit matrix products in the data sheet of the GPU; None if `ogls plan` does not know it."""
    from ogls.planning.gpus import GPUS

    name = device_name(policy).lower().replace(" ", "")
    known = [gpu.flops for gpu in GPUS.values() if gpu.name != "cpu" and gpu.name.split("-")[0] in name]
    return known[0] if known and policy.head.dtype != torch.float32 else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["64"])[0]), (sys.argv[3:] or ["float32"])[0])
