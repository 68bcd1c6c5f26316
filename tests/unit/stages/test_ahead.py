"""The rollouts of a round, sampled beside the evaluation of the round before: the same bits, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import carry_out, content, small_config

from ogls.config.sampling import RolloutConfig
from ogls.execution.work import Shard
from ogls.records import HEALTH
from ogls.samplers.transformers import TransformersSampler
from ogls.stages import evaluate as evaluate_stage
from ogls.stages import sample as sample_stage
from ogls.stages.base_model import BaseModel
from ogls.stages.engine import sample_shards
from ogls.stages.registry import STAGES
from ogls.stages.resume import resume_round
from ogls.stages.run import Run
from ogls.store.writer import StageWriter
from tasks.retention import drop_old


class Computed:
    """Counts the shards that each class of work was given, by (class, whether they are of the next round)."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.shards: dict[tuple[str, bool], int] = {}
        for work in (sample_stage.SampleWork, evaluate_stage.EvaluateWork):
            patch.setattr(work, "outputs", self._counting(work.__name__, work.outputs))

    def _counting(self, name: str, real: Any) -> Any:
        def outputs(work: Any, shards: Sequence[Shard], progress: Any) -> Any:
            for shard in shards:
                key = (name, shard.ahead)
                self.shards[key] = self.shards.get(key, 0) + 1
            return real(work, shards, progress)

        return outputs


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """As if transformers decoded several shards together."""
    monkeypatch.setattr(RolloutConfig, "decodes_together", lambda *_: True)
    return Computed(monkeypatch)


def test_a_run_that_samples_ahead_has_the_same_bits(finished: Run, computed: Computed, tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path), ahead=True)
    assert content(run) == content(finished)
    shards = sum(len(run.records.list_shards("trajectories", r)) for r in (1, 2))
    assert computed.shards == {
        ("EvaluateWork", False): sum(len(run.records.list_shards("scores", r)) for r in (0, 1, 2)),
        ("EvaluateWork", True): shards,  # nothing was sampled a second time, and nothing for round 3
    }
    assert not any(run.records.has_files("ahead", r) for r in range(5))
    for round_ in (1, 2):
        sampled, evaluated = (run.records.manifest(t, r) for t, r in (("trajectories", round_), ("scores", round_ - 1)))
        assert sampled
        assert evaluated
        assert sampled.metrics["seconds"] > sampled.metrics["seconds_beside"] > 0
        assert evaluated.metrics["seconds"] > 0
        assert sampled.metrics["notice"] == ""


def test_a_round_stays_open_until_the_next_stage_begins(finished: Run, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run = carry_out(config, rounds=1, ahead=True)
    assert run.records.has_files("ahead", 2)
    assert not run.is_closed(1)
    assert resume_round(run) == 1
    assert run.records.rounds("trajectories") == [1]
    assert STAGES["evaluate"](run, 1, ahead=True).reused
    assert content(carry_out(config)) == content(finished)


def test_samples_of_another_policy_are_discarded(finished: Run, computed: Computed, tmp_path: Path) -> None:
    """Health decides after the evaluation that round 2 starts from the base model again."""
    config = small_config(tmp_path)
    run = carry_out(config, rounds=1, ahead=True)
    decided = run.records.manifest("health", 1)
    assert decided
    writer = StageWriter(run.records, HEALTH, 1, decided.fingerprint)
    writer.commit("health", {**decided.metrics, "state": "rollback", "restart": 0, "rate": 0.5})
    computed.shards.clear()
    STAGES["sample"](run, 2)
    assert computed.shards == {("SampleWork", False): len(run.records.list_shards("trajectories", 2))}
    assert set(run.records.read("trajectories", 2).column("policy").to_pylist()) == {"base"}
    assert not run.records.has_files("ahead", 2)


@pytest.mark.parametrize("killed_at", ["evaluate", "sample"])
def test_an_interrupted_stage_loses_only_what_it_had_not_finished(
    finished: Run, computed: Computed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    config = small_config(tmp_path, "rollout.batch_size=8", "evaluate.batch_size=8")
    run = carry_out(config, rounds=0)
    STAGES["evaluate"](run, 0)
    (tmp_path / config.name / "scores/round=000/manifest.json").unlink()

    def stop(done: int, total: int) -> None:
        if done >= total - 12 and killed_at == "evaluate":  # one shard of the next round is left
            raise KeyboardInterrupt

    def before_removal(writer: StageWriter) -> None:
        raise KeyboardInterrupt

    real = StageWriter.discard
    monkeypatch.setattr(StageWriter, "discard", before_removal)

    def both() -> None:
        STAGES["evaluate"](run, 0, stop, ahead=True)
        STAGES["sample"](run, 1)

    with pytest.raises(KeyboardInterrupt):
        both()
    monkeypatch.setattr(StageWriter, "discard", real)
    computed.shards.clear()
    carry_out(config, rounds=1, ahead=True)
    assert computed.shards.pop(("EvaluateWork", False)) == len(run.records.list_shards("scores", 1))
    after = len(run.records.list_shards("trajectories", 1))  # sampled beside the evaluation of round 1, for round 2
    assert computed.shards == {("EvaluateWork", True): after + (1 if killed_at == "evaluate" else 0)}
    expected = [finished.records.read(t, 1).column("text") for t in ("trajectories", "scores")]
    assert [run.records.read(t, 1).column("text") for t in ("trajectories", "scores")] == expected


def test_rollouts_are_stored_before_the_base_model_takes_the_memory_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersSampler, "cuda", True, raising=False)
    config = small_config(tmp_path, "rollout.batch_size=8")
    run = carry_out(config, rounds=0)
    (tmp_path / config.name / "scores/round=000/manifest.json").unlink()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseModel, "logprobs", stop)
    with pytest.raises(KeyboardInterrupt):
        STAGES["evaluate"](run, 0, ahead=True)
    stored = run.records.read_json("ahead/round=001/partial.json")
    assert stored
    assert len(stored["shards"]) == 4


def test_a_restart_is_counted_for_the_shard_in_which_it_happened() -> None:
    class Restarted:
        """An engine that was restarted once before, and dies twice in the second of three batches."""

        restarts = 1

        def sample_batches(self, batches: Sequence[Any]) -> Any:
            yield 2, []
            self.restarts += 2
            yield 0, []
            yield 1, []

    shards = [Shard(i, []) for i in range(3)]
    counted = list(sample_shards(cast(Any, Restarted()), shards, [([], cast(Any, None))] * 3))
    assert [(shard.index, restarts) for shard, _, restarts in counted] == [(2, 0), (0, 2), (1, 0)]


def test_rollouts_for_a_round_that_does_not_come_are_removed(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run = carry_out(config, rounds=1, ahead=True)
    drop_old.fn(config, 1)
    assert run.records.has_files("ahead", 2)
    drop_old.fn(config.model_copy(update={"rounds": 1}), 1)
    assert not run.records.has_files("ahead", 2)


@pytest.mark.parametrize(
    ("setting", "round_"), [("execution.sample_ahead=false", 0), ("rounds=1", 1), ("rollout.samples=4", 0)]
)
def test_nothing_is_sampled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, round_: int) -> None:
    """Not where the user says so, not after the last round, not where one process samples shard by shard."""
    if setting.startswith("rollout"):
        monkeypatch.setattr(RolloutConfig, "decodes_together", lambda *_: False)
    config = small_config(tmp_path, setting)
    run = carry_out(config, rounds=round_, ahead=True)
    assert not any(run.records.has_files("ahead", r) for r in range(4))
