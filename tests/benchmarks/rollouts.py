"""Rollouts through the engine's process against vLLM's own offline `generate`, on the same prompts and seeds.

    python tests/benchmarks/rollouts.py OUT

Each way has a process of its own, one after the other, three times in turn; the tiny world's model with heads of 32
dimensions. Writes OUT/rollouts.md: tokens a second, and the ratio.
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

from measured import publish

PROMPTS, SAMPLES, REPEATS = 32, 32, 3


def measure(model: str, way: str) -> dict[str, float]:
    """Tokens a second, the best of three batches, and how many tokens."""
    from conftest import small_config

    from ogls.config import SamplingConfig
    from ogls.problems.load import Exclusions, load_problems
    from ogls.problems.prompts import Prompter
    from ogls.samplers.requests import build_requests
    from ogls.samplers.vllm import VllmSampler, engine_settings, request_settings
    from ogls.tinyworld.seedmodel import PROMPTS as WORDS

    config = small_config("x", "rollout.engine=vllm", f"model.path={model}")
    sampler = VllmSampler(config)
    posed = load_problems(config.problems, "train", Exclusions())[:PROMPTS]
    requests = build_requests(posed, Prompter(sampler.tokenizer, WORDS), SAMPLES, 0, "bench")
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
        wanted = [SamplingParams(**request_settings(r, sampling, sampler.stops)) for r in requests]

        def run() -> int:
            return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, wanted, use_tqdm=False))

    run()  # the first run compiles
    rates, tokens = [], 0
    for _ in range(REPEATS):
        began = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - began))
    return {"tokens": tokens, "rate": max(rates)}


def main(out: Path) -> None:
    from padded import pad_heads

    rates: dict[str, list[float]] = {"offline": [], "engine": []}
    tokens = set()
    with tempfile.TemporaryDirectory() as folder:
        model = pad_heads(Path("data/tiny/model"), Path(folder) / "model")
        for _ in range(REPEATS):
            for way, found in rates.items():
                command = [sys.executable, __file__, "--measure", str(model), way]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                said = json.loads(done.stdout.splitlines()[-1])
                found.append(said["rate"])
                tokens.add(said["tokens"])
                print(way, said, flush=True)
    assert len(tokens) == 1, "the two ways sample other tokens"
    offline, engine = (statistics.median(rates[way]) for way in ("offline", "engine"))
    ways = {"vLLM's `generate`, offline": offline, "through the engine's process": engine}
    rows = [{"way": name, "rate": rate, "share": rate / offline} for name, rate in ways.items()]
    shown = {"way": ("way", ""), "rate": ("tokens a second", ",.0f"), "share": ("share", ".2f")}
    publish(out, "rollouts", rows, shown)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1]))
