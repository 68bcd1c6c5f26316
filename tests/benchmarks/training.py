"""A training step at a vocabulary of 151,936: the head and the loss in chunks against all logits at once.

    python tests/benchmarks/training.py OUT

Both ways run the same model (Qwen3's shape, small), the same rollouts and the same loss, each in a process of its own;
the plain way keeps the logits of every trained token for the backward pass. Writes OUT/training.md and .parquet with
peak memory beyond what the model takes, seconds a step (median of three), and ratios to the plain way.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY, TOKENS, ROLLOUTS, SUPPORT = 151_936, 256, 8, 64
WAYS = ("plain", 1024, 512, 256, 128)


def measure(folder: str, way: str) -> dict[str, float]:
    """Peak MiB beyond the model, seconds a step, and the loss, to see that both ways compute the same."""
    import torch

    from ogls.batching import Batch, TrainItem
    from ogls.config import AdapterConfig, ModelConfig, TrainConfig
    from ogls.losses import LossInputs, distillation
    from ogls.policy import Policy
    from ogls.train import Trainer

    policy = Policy(ModelConfig(path=folder), AdapterConfig(rank=16))
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(ROLLOUTS):
        tokens = torch.randint(3, VOCABULARY, (TOKENS + 32,), generator=generator).tolist()
        ids = torch.randint(0, VOCABULARY, (TOKENS, SUPPORT), generator=generator)
        logprobs = torch.randn(TOKENS, SUPPORT, generator=generator).log_softmax(-1)
        target = {"ids": ids, "logprobs": logprobs, "tail_mass": torch.full((TOKENS,), 1e-3)}
        items.append(TrainItem(("p", i), tuple(tokens[:32]), tuple(tokens[32:]), TOKENS, 0, **target))

    class Plain(Trainer):
        """All logits of a micro-batch at once, alive until its backward pass."""

        def _backward(self, batch: Batch, token_scale: float, tail_scale: float) -> tuple[float, float]:
            hidden = self.policy.hidden(batch.ids, batch.mask).last_hidden_state
            logits = self.policy.logits(hidden[batch.row, batch.place])
            inputs = LossInputs(logits, batch.target_ids, batch.target_logprobs, batch.target_tail)
            loss = distillation(inputs, self.config.divergence).sum()
            (loss * token_scale).backward()
            return loss.item(), 0.0

    config = TrainConfig(head_tokens=1024 if way == "plain" else int(way), learning_rate=1e-6)
    trainer = (Plain if way == "plain" else Trainer)(policy, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, losses = [], []
    for _ in range(3):
        began = time.perf_counter()
        losses.append(trainer.update(items)["loss"])
        seconds.append(time.perf_counter() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"peak_mib": peak, "seconds": statistics.median(seconds), "loss": losses[0]}


def build(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A random model of Qwen3's shape, with that vocabulary and the tiny world's tokenizer."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree("data/tiny/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "max_position_embeddings": 2048,
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 768,
        "head_dim": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build(model)
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", str(model), str(way)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"way": str(way), **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    plain = rows[0]
    assert all(abs(r["loss"] - plain["loss"]) < 1e-4 for r in rows), "the ways compute different losses"
    pq.write_table(pa.Table.from_pylist(rows), out / "training.parquet")
    lines = ["| head_tokens | peak MiB beyond the model | times less | seconds a step | times as long |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for r in rows:
        less, longer = plain["peak_mib"] / r["peak_mib"], r["seconds"] / plain["seconds"]
        name = "all logits at once" if r["way"] == "plain" else r["way"]
        lines.append(f"| {name} | {r['peak_mib']:,.0f} | {less:.1f} | {r['seconds']:.2f} | {longer:.2f} |")
    (out / "training.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1]))
