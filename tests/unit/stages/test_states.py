"""Teacher states are written row group by row group, and what needs a few rollouts reads their row groups only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import REPO, small_config
from history import counted, make_history

from ogls.analysis.token_view import build_token_view
from ogls.distillation import teacher
from ogls.stages import teach as teaching
from ogls.stages.groups import read_states, state_keys
from ogls.stages.registry import STAGES
from ogls.stages.run import Run, open_run
from ogls.training import batching as training


@pytest.fixture
def grouped(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The finished run, whose states of round 2 are written with one rollout per row group, one group at a time."""
    shutil.copytree(finished.records.url("."), tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "teacher_states" / "round=002")
    monkeypatch.setattr(teaching, "_ROW_GROUP", 1)
    monkeypatch.setattr(teaching, "STATES_IN_MEMORY", 1)
    run = Run(small_config(tmp_path))
    run.check_identity()
    assert not STAGES["teach"](run, 2).reused
    monkeypatch.undo()
    monkeypatch.chdir(REPO)
    return run


def states(run: Run, chosen: Any = None) -> dict[Any, Any]:
    return dict(read_states(run, 2, chosen))


def test_a_shard_is_written_group_by_group(finished: Run, grouped: Run) -> None:
    """With the rows of one that was written at once; batches of other groups differ by rounding."""
    expected, found = states(finished), states(grouped)
    assert list(found) == list(expected)
    for key, pools in expected.items():
        assert list(found[key]) == list(pools)
        assert all((found[key][pool] - s).abs().max() < 1e-2 for pool, s in pools.items())
    for entry, keys in state_keys(grouped, 2):
        metadata = pq.ParquetFile(grouped.records.url(entry.path)).metadata
        assert metadata.num_row_groups == len(set(keys)) > 1
        assert entry.metrics["tokens"] == sum(len(s) for key in set(keys) for s in found[key].values())
    assert grouped.records.is_intact("teacher_states", 2)


def test_no_more_states_than_allowed_are_in_memory(finished: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """Each call of the teacher has one group, although a shard has four."""
    shutil.copytree(finished.records.url("."), tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "teacher_states" / "round=002")
    groups: list[int] = []
    real = teacher.score_rollouts
    monkeypatch.setattr(
        teacher, "score_rollouts", lambda p, s, n: (groups.append(len({i.key[0] for i in s})), real(p, s, n))[1]
    )
    monkeypatch.setattr(teaching, "STATES_IN_MEMORY", 1)
    STAGES["teach"](Run(small_config(tmp_path)), 2)
    assert set(groups) == {1}
    assert len(groups) > 2


def test_chosen_rollouts_are_read_without_the_others(grouped: Run) -> None:
    everything = states(grouped)
    chosen = set(list(everything)[1::3])
    with counted() as cost:
        found = states(grouped, chosen)
    assert found.keys() == chosen
    assert all((found[k][p] == everything[k][p]).all() for k in chosen for p in found[k])
    total = sum(entry.bytes for entry, _ in state_keys(grouped, 2))
    assert cost.read_bytes < 0.45 * total + 2 * 2**16  # a third of the rows, and the ends of two files
    with counted() as cost:
        one = next(iter(chosen))
        assert states(grouped, {one}).keys() == {one}
    assert sum("/part-" in path and "teacher_states" in path for path in cost.paths) == 1  # one shard of two


def test_a_remote_store_is_asked_for_ranges(grouped: Run) -> None:
    remote = make_history(grouped, "memory://ranges", 2)
    key = list(states(grouped))[-1]
    with counted() as cost:
        found = states(remote, {key})
    assert all((found[key][pool] == s).all() for pool, s in states(grouped)[key].items())
    assert cost.read_bytes < 0.5 * sum(entry.bytes for entry, _ in state_keys(grouped, 2))


def test_style_reads_the_rollouts_that_it_measures(grouped: Run, tmp_path: Path) -> None:
    config = small_config(tmp_path, "style.rollouts=3")
    with counted() as cost:
        assert STAGES["style"](Run(config), 2).metrics["rollouts"] == 3
    reads = [path for path in cost.paths if "teacher_states" in path and path.endswith(".parquet")]
    assert 0 < len(reads) <= 2
    few = cost.read_bytes
    with counted() as cost:
        STAGES["style"](Run(small_config(tmp_path, "style.rollouts=999")), 2)
    assert cost.read_bytes - few > 0.5 * sum(entry.bytes for entry, _ in state_keys(grouped, 2))


def test_the_token_view_reads_the_rollouts_that_it_shows(grouped: Run) -> None:
    problem, sample = next(iter(states(grouped)))
    with counted() as cost:
        build_token_view(grouped, [2], problem, sample, policy=False)
    assert sum("teacher_states/" in path and path.endswith(".parquet") for path in cost.paths) == 1


def test_states_of_a_store_without_contexts_are_found() -> None:
    old = open_run(str(REPO / "tests" / "golden" / "store-v2"), "old")
    everything = dict(read_states(old, 1))
    key = list(everything)[-1]
    assert states_equal(dict(read_states(old, 1, {key}))[key], everything[key])


def states_equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all((one[pool] == other[pool]).all() for pool in one)


def test_full_targets_are_read_when_they_are_trained_on(
    grouped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of states that are all in memory, also for a rollout that is cut at its first mistake."""
    monkeypatch.setattr(Run, "check_identity", lambda _: None)
    config = small_config(tmp_path, "train.support=full", "train.until=first_mistake", "train.epochs=2")
    alive: list[int] = []
    real = training.collate

    def collate(items: Any, device: Any) -> Any:
        alive.append(sum(callable(item.state) for item in items))
        return real(items, device)

    monkeypatch.setattr("ogls.training.trainer.collate", collate)
    run = Run(config)
    STAGES["steer"](run, 2)
    with counted() as cost:
        streamed = STAGES["train"](run, 2)
    rollouts = len(states(grouped))
    assert sum(alive) == 2 * rollouts
    opened = [path for path in cost.paths if "teacher_states" in path and "/part-" in path]
    assert len(opened) == 2 + 2 * rollouts  # the ends of two shards, and each rollout once an epoch
    monkeypatch.setattr("ogls.stages.train.count_row_groups", lambda *_: 1)
    shutil.rmtree(tmp_path / "tiny" / "updates" / "round=002")
    alive.clear()
    held = STAGES["train"](run, 2)
    assert sum(alive) == 0
    assert held.metrics["policy"] == streamed.metrics["policy"]
    assert held.metrics["loss"] == streamed.metrics["loss"]
