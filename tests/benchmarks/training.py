"""Memory and time of a training step with a vocabulary of 151,936: loss in chunks compared with all logits at once.

    python tests/benchmarks/training.py OUT

Both ways use the same small Qwen3 model, the same rollouts and the same loss, each in a separate process. The plain way
keeps the logits of all trained tokens for the backward pass. Writes OUT/training.md and .parquet with the peak memory
of a step beyond the memory allocated before, seconds per step (median of three), and ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = ["tests"]

from measured import median_seconds, peak_bytes, write_results
from randommodel import random_model

VOCABULARY, TOKENS, ROLLOUTS, SUPPORT = 151_936, 256, 8, 64
WAYS = ("all logits at once", 1024, 512, 256, 128)


def measure(folder: str, way: str) -> dict[str, float]:
    """Peak memory of a step in MiB, seconds per step, and the loss, which must be the same for all ways."""
    import torch

    from ogls.config import AdapterConfig, ModelConfig, TrainConfig
    from ogls.models.policy import Policy
    from ogls.training.batching import Batch, TrainItem
    from ogls.training.losses import divergence, target_bins
    from ogls.training.trainer import Trainer

    policy = Policy(ModelConfig(path=folder), AdapterConfig(rank=16))
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(ROLLOUTS):
        tokens = torch.randint(3, VOCABULARY, (TOKENS + 32,), generator=generator).tolist()
        ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:SUPPORT] for _ in range(TOKENS)])
        logprobs = torch.randn(TOKENS, SUPPORT, generator=generator).log_softmax(-1)
        target = {"ids": ids, "logprobs": logprobs, "tail_mass": torch.full((TOKENS,), 1e-3)}
        items.append(TrainItem(("p", i), tuple(tokens[:32]), tuple(tokens[32:]), TOKENS, 0, **target))

    class Plain(Trainer):
        """Computes all logits of a micro-batch at once and keeps them for the backward pass."""

        def _backward(self, batch: Batch, token_scale: float, tail_scale: float, _: object) -> tuple[float, float]:
            hidden = self.policy.run_body(batch.ids, batch.mask).last_hidden_state
            logprobs = self.policy.logits(hidden[batch.row, batch.position]).log_softmax(-1)
            support = logprobs.gather(-1, batch.target_ids)
            tail = torch.log1p(-support.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
            target = target_bins(batch.target_logprobs, batch.target_tail, support.shape[-1] + 1)
            loss = divergence(self.config.divergence, target, torch.cat([support, tail], -1)).sum()
            (loss * token_scale).backward()
            return loss.item(), 0.0

    config = TrainConfig(head_tokens=1024 if way == WAYS[0] else int(way), learning_rate=1e-6)
    trainer = (Plain if way == WAYS[0] else Trainer)(policy, config)
    losses: list[float] = []
    step_seconds = median_seconds(lambda: losses.append(trainer.optimizer_step(items)["loss"]))
    return {
        "peak_mib": peak_bytes(lambda: trainer.optimizer_step(items)) / 2**20,
        "seconds": step_seconds,
        "loss": losses[0],
    }


def main(out: Path) -> None:
    """Measure each way in a separate process, and write the results."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", vocab_size=VOCABULARY)
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", str(model), str(way)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"way": str(way), **json.loads(result.stdout.splitlines()[-1])})
    plain = rows[0]
    assert all(abs(r["loss"] - plain["loss"]) < 1e-4 for r in rows), "the losses of the ways differ"
    for row in rows:
        row["less"], row["longer"] = plain["peak_mib"] / row["peak_mib"], row["seconds"] / plain["seconds"]
    columns = {
        "way": ("head_tokens", ""),
        "peak_mib": ("peak MiB of a step", ",.0f"),
        "less": ("times less", ".1f"),
        "seconds": ("seconds a step", ".2f"),
        "longer": ("times as long", ".2f"),
    }
    write_results(out, "training", rows, columns)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1]))
