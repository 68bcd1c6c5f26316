"""Shards on a Ray cluster of two nodes with one CPU each: how many workers carry them out, and which die, changes
no bit."""

from __future__ import annotations

import collections
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import content, small_config

from flows import doctor
from ogls.analysis.rounds import workers_markdown
from ogls.errors import ClusterUnavailable, ConfigError, DataError, StoreError
from ogls.execution.work import Job, OneByOne, Shard, ShardOutput
from ogls.records import VERDICTS
from ogls.records.schema import to_arrow
from ogls.stages import steer, workers
from ogls.stages.registry import STAGES
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHARDED = ("sample", "verify", "teach", "steer", "evaluate")
SETTINGS = (
    "rounds=2",
    "problems.per_round=6",
    "rollout.batch_size=4",
    "verify.shard_rollouts=4",
    "verify.workers=1",
    "teacher.shard_groups=1",
    "evaluate.batch_size=4",
)
Progress = Callable[[int, int], None]


@pytest.fixture(scope="module", autouse=True)
def small_steer_shards() -> Iterator[None]:
    """Several shards of targets, although there are few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steer, "STEER_SHARD_STATES", 64)
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    cluster.add_node(**size)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    workers.end_workers()
    ray.shutdown()
    cluster.shutdown()


def run_once(root: Path, disturb: Callable[[str], Progress], *overrides: str, ahead: bool = False) -> Run:
    """A run of one round; `disturb` gives the progress callback of a stage. With `ahead`, round 2 is sampled too."""
    run = Run(small_config(root, *SETTINGS, *overrides))
    run.open()
    if run.config.execution.workers == "ray":
        workers.shared_pool(run).await_workers(run.config.execution.worker_count or 2)
    for name, round_ in [("prepare", 0), *((n, 1) for n in (*SHARDED[:4], "train", "evaluate"))]:
        options = {"ahead": ahead} if name == "evaluate" else {}
        notices.append(STAGES[name](run, round_, disturb(name), **options).notice)
    if ahead:
        STAGES["sample"](run, 2)
    return run


notices: list[str] = []  # of the stages of the last run


def nothing(_: str) -> Progress:
    return lambda done, total: None


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        return run_once(tmp_path_factory.mktemp("local"), nothing, ahead=True)


def assert_same_bits(run: Run, local: Run) -> None:
    assert run.records.read("verdicts", 1).to_pylist() == local.records.read("verdicts", 1).to_pylist()
    theirs, ours = content(local), content(run)
    assert ours == {name: theirs[name] for name in ours}
    for table in ("trajectories", "verdicts", "teacher_states", "targets", "updates", "scores"):
        ours, theirs = run.records.manifest(table, 1), local.records.manifest(table, 1)
        assert ours
        assert theirs
        assert ours.digest == theirs.digest
        assert len(ours.files_of(table)) > 1 or table == "updates"


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_workers_give_the_bits_of_one_process(cluster: Any, local: Run, tmp_path: Path, count: int) -> None:
    run = run_once(tmp_path, nothing, "execution.workers=ray", f"execution.worker_count={count}")
    assert_same_bits(run, local)
    manifest = run.records.manifest("scores", 1)
    assert manifest
    did = manifest.metrics["workers"].values()
    assert sum(w["shards"] for w in did) == len(manifest.files_of("scores"))
    assert all(w["tokens"] > 0 and w["seconds"] > 0 and w["device"].startswith("CPU") for w in did)
    table = workers_markdown(run.records, 1).splitlines()
    assert all(f"| evaluate | {name} | CPU" in "".join(table) for name in manifest.metrics["workers"])
    assert len(manifest.metrics["workers"]) == count


@pytest.mark.parametrize("stages", [("sample", "teach", "evaluate"), pytest.param(SHARDED, marks=pytest.mark.nightly)])
def test_a_worker_killed_in_each_stage_changes_no_bit(
    cluster: Any, local: Run, tmp_path: Path, stages: tuple[str, ...]
) -> None:
    killed = []

    def disturb(stage: str) -> Progress:
        def kill_one(done: int, total: int) -> None:
            pool = workers._pool
            if stage in stages and stage not in killed and pool and pool._busy and done < total:
                (member, *_) = pool._busy.values()
                assert member.facts
                os.kill(int(member.facts.name.partition("/")[2]), signal.SIGKILL)
                killed.append(stage)

        return kill_one

    notices.clear()
    run = run_once(tmp_path, disturb, "execution.workers=ray", ahead=True)
    assert killed == [*stages]
    assert_same_bits(run, local)
    sampled = run.records.manifest("trajectories", 2)  # beside the evaluation
    assert sampled
    assert sampled.metrics["seconds_beside"] > 0
    assert sum(w["shards"] for w in sampled.metrics["workers"].values()) == len(sampled.files)
    assert sum("was lost" in notice and "goes to another worker" in notice for notice in notices) == len(stages)


@pytest.mark.nightly
def test_nodes_that_leave_and_join_in_a_stage_change_no_bit(cluster: Any, local: Run, tmp_path: Path) -> None:
    steps: list[str] = []

    def disturb(stage: str) -> Progress:
        def change(done: int, total: int) -> None:
            pool = workers._pool
            assert pool
            if stage == "sample" and not steps:
                (node,) = cluster.worker_nodes
                cluster.remove_node(node, allow_graceful=False)
                steps.append("removed")
            elif stage == "evaluate" and steps == ["removed"]:
                cluster.add_node(num_cpus=1, object_store_memory=10**8)
                pool.await_workers(2)  # it joins while the stage runs
                steps.append("added")

        return change if stage in SHARDED else nothing(stage)

    notices.clear()
    run = run_once(tmp_path, disturb, "execution.workers=ray")
    assert steps == ["removed", "added"]
    assert_same_bits(run, local)
    assert "was lost" in notices[1]
    used = [run.records.manifest(table, 1) for table in ("teacher_states", "scores")]
    assert [len(m.metrics["workers"]) for m in used if m] == [1, 2]


def test_nodes_that_lack_something_are_refused_before_the_first_shard(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small_config(tmp_path, *SETTINGS, "execution.workers=ray"))
    monkeypatch.setattr(workers, "write_token", lambda *_: "the token of another store")
    with pytest.raises(StoreError) as error:
        workers.shared_pool(run)
    text = str(error.value)
    assert text.startswith("2 of 2 nodes of the Ray cluster cannot carry out shards of this run:\n")
    assert text.count(f"it does not see the store: {tmp_path} has no token of this run there") == 2
    monkeypatch.setattr(workers, "code_version", lambda: {"version": "0.2.0", "revision": None})
    with pytest.raises(ConfigError, match=r"and the driver ogls-sd 0\.2\.0: install the same version"):
        workers.shared_pool(run)


def test_the_doctor_says_which_cluster_answers(cluster: Any, tmp_path: Path) -> None:
    findings = {f.name: f for f in doctor._workers(small_config(tmp_path, "execution.workers=ray"))}
    assert findings["workers"].message == f"Ray at {cluster.address}: 2 workers with 1 CPUs each"
    assert findings["node"].message.endswith("1 CPUs, 0 GPUs; it sees the store and has the model")
    assert list(tmp_path.iterdir()) == []


def job_of(run: Run, open_work: Any) -> tuple[Job, list[Shard]]:
    return Job(workers.worker_config(run.config), 1, "verdicts", 0, open_work), [Shard(0, [1])]


@pytest.mark.nightly
def test_a_shard_that_loses_four_workers_ends_the_stage(cluster: Any, tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, *SETTINGS, "execution.workers=ray", "execution.worker_count=1"))

    def die(*_: Any) -> Any:
        os._exit(1)

    told: list[str] = []
    with pytest.raises(ClusterUnavailable, match="it was the worker number 4 that this shard has lost") as error:
        list(workers.shared_pool(run).carry_out(*job_of(run, die), told.append))
    assert str(error.value).startswith("shard 0: ")
    assert [t.endswith("the shard goes to another worker") for t in told] == [True] * 3


def test_a_run_on_devices_that_others_use_says_so(cluster: Any, tmp_path: Path) -> None:
    import ray

    workers.end_workers()
    run = Run(small_config(tmp_path, *SETTINGS, "execution.workers=ray", "execution.worker_start_seconds=2"))
    holders = [ray.remote(num_cpus=1)(collections.Counter).remote() for _ in range(2)]
    ray.get([holder.total.remote() for holder in holders])
    with pytest.raises(ClusterUnavailable, match=r"and of 2 in 2 nodes 0 are free; wait until other"):
        list(workers.shared_pool(run).carry_out(*job_of(run, None), nothing))
    for holder in holders:
        ray.kill(holder)


def test_an_error_of_a_shard_is_the_error_of_the_stage(cluster: Any, tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, *SETTINGS, "execution.workers=ray", "execution.worker_count=1"))

    def refuse(*_: Any) -> Any:
        raise DataError("problems.jsonl: 1 malformed line")

    with pytest.raises(DataError, match=r"^problems.jsonl: 1 malformed line$"):
        list(workers.shared_pool(run).carry_out(*job_of(run, refuse), nothing))


def test_shards_that_a_worker_had_together_go_to_others_when_it_dies(cluster: Any, tmp_path: Path) -> None:
    import ray

    class Together(OneByOne):  # pickled by value, because it is local
        """Work of an engine that has all of its shards at once; a shard is finished every .3 s."""

        def compute(self, items: Any, progress: Any) -> ShardOutput:
            time.sleep(0.3)
            verdict = {"verdict": "correct", "outcome": "correct", "answer": "1", "feedback": None, "reward": None}
            return ShardOutput(to_arrow(VERDICTS, [{"problem_id": "p", "sample": n, **verdict} for n in items]))

        def outputs(self, shards: Any, progress: Any) -> Any:
            return super().outputs([*reversed(shards)], progress)

        def close(self) -> None:
            pass

    run = Run(small_config(tmp_path, *SETTINGS, "execution.workers=ray", "execution.worker_count=2"))
    job, _ = job_of(run, lambda *_: Together())
    pool, told, seen = workers.shared_pool(run), [], []
    for finished in pool.carry_out(replace(job, together=True), [Shard(i, [i]) for i in range(8)], told.append):
        seen.append(finished.key[1])
        if len(seen) == 1:  # the worker that joined first got three quarters of its half: 3; one that came later 2 of 5
            (busy,) = (m for m in pool._busy.values() if finished.worker == str(m))
            assert len(busy.shards) in (1, 2)  # without the finished one
            ray.kill(busy.actor)
    assert sorted(seen) == [*range(8)]
    assert told[0].startswith("shard")
    assert "was lost" in told[0]
