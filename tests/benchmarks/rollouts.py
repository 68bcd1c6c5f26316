"""Sampling rate of the engine process compared with vLLM's offline `generate`, with the same prompts and seeds.

    python tests/benchmarks/rollouts.py OUT

Each way runs in a separate process, alternating, three times each, with the model of the tiny world with heads of 32
dimensions. Writes OUT/rollouts.md and .parquet with tokens per second and the ratio.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = ["tests", "tests/unit/samplers"]

from measured import write_results

PROMPTS, SAMPLES, REPEATS = 32, 32, 3


def measure(model: str, way: str) -> dict[str, float]:
    """Tokens per second of the fastest of three batches, and the number of tokens of a batch."""
    from conftest import small_config

    from ogls.config import SamplingConfig
    from ogls.problems.load import Exclusions, load_problems
    from ogls.problems.prompts import Prompter
    from ogls.samplers.requests import build_requests
    from ogls.samplers.vllm import VllmSampler, engine_settings, request_settings
    from ogls.tinyworld.seedmodel import PROMPTS as TEMPLATES

    config = small_config("x", "rollout.engine=vllm", f"model.path={model}")
    sampler = VllmSampler(config)
    problems = load_problems(config.problems, "train", Exclusions())[:PROMPTS]
    requests = build_requests(problems, Prompter(sampler.tokenizer, TEMPLATES), SAMPLES, 0, "bench")
    sampling = SamplingConfig(max_tokens=64)
    if way == "engine":
        sampler.use_adapter(None)

        def run() -> int:
            return sum(len(c.token_ids) for c in sampler.sample(requests, sampling))
    else:
        import os

        settings = engine_settings(config, cuda=False)
        os.environ.update(settings["environment"])
        from vllm import LLM, SamplingParams

        llm = LLM(**settings["engine"])
        prompts: Any = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        parameters = [SamplingParams(**request_settings(r, sampling, sampler.stops)) for r in requests]

        def run() -> int:
            return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, parameters, use_tqdm=False))

    run()  # the first run compiles the model
    rates, tokens = [], 0
    for _ in range(REPEATS):
        start = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens": tokens, "rate": max(rates)}


def main(out: Path) -> None:
    """Measure both ways in separate processes, and write the results."""
    from padded import pad_heads

    rates: dict[str, list[float]] = {"offline": [], "engine": []}
    tokens = set()
    with tempfile.TemporaryDirectory() as folder:
        model = pad_heads(Path("data/tiny/model"), Path(folder) / "model")
        for _ in range(REPEATS):
            for way, way_rates in rates.items():
                command = [sys.executable, __file__, "--measure", str(model), way]
                process = subprocess.run(command, check=True, capture_output=True, text=True)
                result = json.loads(process.stdout.splitlines()[-1])
                way_rates.append(result["rate"])
                tokens.add(result["tokens"])
                print(way, result, flush=True)
    assert len(tokens) == 1, "the two ways sampled different numbers of tokens"
    offline, engine = (statistics.median(rates[way]) for way in ("offline", "engine"))
    ways = {"vLLM's `generate`, offline": offline, "through the engine's process": engine}
    rows = [{"way": name, "rate": rate, "share": rate / offline} for name, rate in ways.items()]
    columns = {"way": ("way", ""), "rate": ("tokens a second", ",.0f"), "share": ("share", ".2f")}
    write_results(out, "rollouts", rows, columns)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1]))
