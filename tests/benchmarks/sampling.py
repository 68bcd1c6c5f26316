"""Time of sampling with the transformers engine, against `generate` of transformers on merged weights.

    python tests/benchmarks/sampling.py OUT

The ways sample the same number of tokens after the same prompts, in turns in one process, on one thread: `generate`
with the adapter merged into the weights, this engine, and this engine with the adapter beside the weights. The models
are the tiny one and, after `make real`, SmolLM2-135M (V = 49,152). Writes OUT/sampling.md and .parquet with medians
over the repeats: tokens a second of CPU time, and shares of the CPU time of `generate`.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = ["tests"]

from measured import write_results

PROMPT, TOKENS, REPEATS = 60, 24, 5
MODELS = {  # path, and rollouts that are sampled together
    "tiny": ("data/tiny/model", 256),
    "SmolLM2-135M": ("data/models/smollm2-135m", 32),
}


def measure(name: str, path: str, rollouts: int) -> list[dict[str, Any]]:
    """One row per way."""
    import torch

    from ogls.config import AdapterConfig, ModelConfig, RolloutConfig
    from ogls.models.policy import Policy
    from ogls.records import Request
    from ogls.samplers.transformers import TransformersSampler

    policy = Policy(ModelConfig(path=path), AdapterConfig(rank=32, alpha=64))
    policy.stop_ids = ()  # every rollout has all of its tokens
    with torch.no_grad():
        for weight in policy.parameters.values():
            weight.normal_(0, 0.01)
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(3, len(policy.head)) for _ in range(PROMPT)) for _ in range(rollouts)]
    requests = [Request("p", i, prompt, i) for i, prompt in enumerate(prompts)]
    settings = RolloutConfig(max_tokens=TOKENS, batch_size=rollouts)
    ids, sampler = torch.tensor(prompts), TransformersSampler(policy)

    def generate() -> Any:
        lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with policy.merged(), torch.inference_mode():
            return policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths, **sampling)

    def apart() -> Any:
        with mock.patch.object(Policy, "merged", nullcontext):
            return sampler.sample(requests, settings)

    ways: dict[str, Callable[[], Any]] = {
        "`generate` on merged weights": generate,
        "this engine": lambda: sampler.sample(requests, settings),
        "this engine, adapter beside the weights": apart,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS + 1):
        for way, call in ways.items():
            start = time.process_time()
            call()
            seconds[way].append(time.process_time() - start)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}  # the first one warms up
    reference = next(iter(medians.values()))
    return [
        {"model": name, "way": way, "rate": rollouts * TOKENS / s, "share": s / reference} for way, s in medians.items()
    ]


def main(out: Path) -> None:
    """Measure the models that are there, and write the results."""
    import torch

    torch.set_num_threads(1)
    rows = [row for name, model in MODELS.items() if Path(model[0]).exists() for row in measure(name, *model)]
    columns = {
        "model": ("model", ""),
        "way": ("way", ""),
        "rate": ("tokens a second", ",.0f"),
        "share": ("time, `generate` = 1", ".2f"),
    }
    write_results(out, "sampling", rows, columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
