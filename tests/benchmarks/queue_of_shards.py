"""Sampling with vLLM where lengths differ: shards as one queue, against shard by shard and one batch of all requests.

    python tests/benchmarks/queue_of_shards.py OUT

The lengths are log-normal and cut at ten times the median; they are forced, so every way samples the same tokens. The
engine decodes as many sequences at once as a shard has. The ways alternate in one process with one engine, with the
model of the tiny world. Writes OUT/queue_of_shards.md and .parquet with medians over the repeats.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path[:0] = ["tests", "tests/unit/samplers"]

from measured import write_results

SHARDS, SHARD, MEDIAN, SIGMA, REPEATS = 8, 64, 24, 1.0, 3


def measure(model: Path) -> dict[str, float]:
    """Median tokens a second of each way."""
    from conftest import small_config

    from ogls.config import SamplingConfig
    from ogls.records import Request
    from ogls.samplers import vllm
    from ogls.samplers.vllm import VllmSampler

    rng = np.random.default_rng(0)
    lengths = np.minimum(MEDIAN * rng.lognormal(0, SIGMA, SHARDS * SHARD), 10 * MEDIAN).astype(int) + 1
    requests = [Request("p", i, tuple(rng.integers(3, 300, 60).tolist()), i) for i in range(len(lengths))]
    engine = f"rollout.vllm.max_sequences={SHARD}"
    config = small_config("x", "rollout.engine=vllm", f"model.path={model}", engine, "rollout.max_tokens=300")
    settings_of = vllm.request_settings

    def forced(request: Request, sampling: SamplingConfig, stops: Any) -> dict[str, Any]:
        length = int(lengths[request.sample])
        return {**settings_of(request, sampling, ()), "max_tokens": length, "ignore_eos": True}

    sampling = SamplingConfig(max_tokens=300)
    shards = [(requests[i : i + SHARD], sampling) for i in range(0, len(requests), SHARD)]
    sampler = VllmSampler(config)
    one_by_one = config.rollout.vllm.model_copy(update={"one_queue": False})
    apart = VllmSampler(config.model_copy(update={"rollout": config.rollout.model_copy(update={"vllm": one_by_one})}))
    ways: dict[str, Callable[[], Any]] = {
        "one batch of all requests": lambda: sampler.sample(requests, sampling),
        "shards as one queue": lambda: list(sampler.sample_batches(shards)),
        "shard by shard": lambda: list(apart.sample_batches(shards)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with mock.patch.object(vllm, "request_settings", forced):
        for repeat in range(REPEATS + 1):
            for way, call in ways.items():
                start = time.perf_counter()
                call()
                if repeat:  # the first one compiles the model
                    seconds[way].append(time.perf_counter() - start)
    return {way: int(lengths.sum()) / statistics.median(times) for way, times in seconds.items()}


def main(out: Path) -> None:
    """Measure the ways, and write the results."""
    from padded import pad_heads

    with tempfile.TemporaryDirectory() as folder:
        rates = measure(pad_heads(Path("data/tiny/model"), Path(folder) / "model"))
    whole = rates["one batch of all requests"]
    rows = [{"way": way, "rate": rate, "share": rate / whole} for way, rate in rates.items()]
    columns = {"way": ("way", ""), "rate": ("tokens a second", ",.0f"), "share": ("share", ".2f")}
    write_results(out, "queue_of_shards", rows, columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
