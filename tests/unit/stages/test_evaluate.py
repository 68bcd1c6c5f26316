"""The base model of `evaluate.base_kl` is never beside an engine in the memory of a GPU, and gives the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROUND, small_config

from ogls.models.policy import Policy
from ogls.records import Completion
from ogls.stages import base_model, evaluate
from ogls.stages.engine import sampler_for_round
from ogls.stages.registry import STAGES
from ogls.stages.run import Run


@pytest.fixture
def trained(finished: Run, tmp_path: Path) -> Run:
    """A run of which everything but the evaluation of round 1 is done."""
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    for table in ("scores", "summaries"):
        shutil.rmtree(tmp_path / "tiny" / table / "round=001")
    return Run(small_config(tmp_path))


def test_the_transformers_engine_is_the_base_model_too(
    finished: Run, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model is loaded, and its adapter comes back after every shard."""
    assert "evaluate" in ROUND
    loads: list[int] = []
    load = Policy.__init__
    monkeypatch.setattr(Policy, "__init__", lambda self, *a, **k: loads.append(1) or load(self, *a, **k))
    STAGES["evaluate"](trained, 1)
    assert len(loads) == 1
    assert trained.records.read("scores", 1).equals(finished.records.read("scores", 1))


def test_an_engine_sleeps_while_the_base_model_runs(
    finished: Run, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    inner, prompter = sampler_for_round(trained, 1)

    class Engine:
        """An engine on the same GPU, with the numbers of the transformers engine."""

        restarts, hash, cuda = 0, inner.hash, True

        def sample_batches(self, batches: Sequence[Any]) -> Generator[tuple[int, list[Completion]]]:
            for index, (requests, sampling) in enumerate(batches):
                events.append("sample")
                yield index, inner.sample(requests, sampling)

        def release_memory(self) -> None:
            events.append("release")

    real, move = base_model.rollout_logprobs, Policy.move_to
    monkeypatch.setattr(evaluate, "sampler_for_round", lambda *_: (Engine(), prompter))
    monkeypatch.setattr(base_model, "rollout_logprobs", lambda *a: events.append("base") or real(*a))
    monkeypatch.setattr(Policy, "move_to", lambda self, device: events.append(f"to {device}") or move(self, device))
    STAGES["evaluate"](trained, 1)
    shards = len(trained.records.manifest("scores", 1).files_of("scores"))
    assert shards > 1
    assert events == [*["sample"] * shards, *["release", "to cpu", "base"] * shards, "release"]
    assert trained.records.read("scores", 1).equals(finished.records.read("scores", 1))
