"""A training step at a vocabulary of 151,936: the head and the loss in chunks against all logits at once.

    python tests/benchmarks/training.py OUT

Both ways run the same model (Qwen3's shape, small), the same rollouts and the same loss, each in a process of its own;
the plain way keeps the logits of every trained token for the backward pass. Writes OUT/training.md and .parquet with
the peak of what torch has alive in a step beyond what it had before, seconds a step (median of three), and ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = ["tests"]

from measured import peak_bytes, publish, seconds
from randommodel import random_model

VOCABULARY, TOKENS, ROLLOUTS, SUPPORT = 151_936, 256, 8, 64
WAYS = ("all logits at once", 1024, 512, 256, 128)


def measure(folder: str, way: str) -> dict[str, float]:
    """Peak MiB beyond the model, seconds a step, and the loss, to see that both ways compute the same."""
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
        """All logits of a micro-batch at once, alive until its backward pass; the losses as one writes them first."""

        def _backward(self, batch: Batch, token_scale: float, tail_scale: float) -> tuple[float, float]:
            hidden = self.policy.run_body(batch.ids, batch.mask).last_hidden_state
            logprobs = self.policy.logits(hidden[batch.row, batch.place]).log_softmax(-1)
            inside = logprobs.gather(-1, batch.target_ids)
            rest = torch.log1p(-inside.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
            target = target_bins(batch.target_logprobs, batch.target_tail, inside.shape[-1] + 1)
            loss = divergence(self.config.divergence, target, torch.cat([inside, rest], -1)).sum()
            (loss * token_scale).backward()
            return loss.item(), 0.0

    config = TrainConfig(head_tokens=1024 if way == WAYS[0] else int(way), learning_rate=1e-6)
    trainer = (Plain if way == WAYS[0] else Trainer)(policy, config)
    losses: list[float] = []
    took = seconds(lambda: losses.append(trainer.optimizer_step(items)["loss"]))
    return {"peak_mib": peak_bytes(lambda: trainer.optimizer_step(items)) / 2**20, "seconds": took, "loss": losses[0]}


def main(out: Path) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", vocab_size=VOCABULARY)
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", str(model), str(way)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"way": str(way), **json.loads(done.stdout.splitlines()[-1])})
    plain = rows[0]
    assert all(abs(r["loss"] - plain["loss"]) < 1e-4 for r in rows), "the ways compute different losses"
    for row in rows:
        row["less"], row["longer"] = plain["peak_mib"] / row["peak_mib"], row["seconds"] / plain["seconds"]
    shown = {
        "way": ("head_tokens", ""),
        "peak_mib": ("peak MiB of a step", ",.0f"),
        "less": ("times less", ".1f"),
        "seconds": ("seconds a step", ".2f"),
        "longer": ("times as long", ".2f"),
    }
    publish(out, "training", rows, shown)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1]))
