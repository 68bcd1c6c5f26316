"""Carrying out shards without a cluster: checks of a node, devices of a worker, models that a worker keeps."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, small_config

from ogls.analysis.rounds import workers_markdown
from ogls.config import RunConfig, build_config
from ogls.errors import ClusterUnavailable, ConfigError, StoreError
from ogls.execution import node_check, ray_cluster
from ogls.execution.node_check import find_problems, remove_token, require_token
from ogls.execution.ray_cluster import Node, find_room, require_ray
from ogls.execution.ray_worker import Worker
from ogls.execution.work import FinishedShard, Job, OneByOne, Shard, ShardOutput
from ogls.models.policy import Policy
from ogls.records import VERDICTS
from ogls.stages import sample, teach, workers
from ogls.stages.run import Run
from ogls.stages.shards import carry_out_shards, divide
from ogls.store import Store
from ogls.store.manifest import FileEntry
from ogls.store.writer import ShardWriter, StageWriter


def expected_for(root: Path, *overrides: str) -> node_check.Expected:
    config = workers.worker_config(small_config(root, *overrides))
    return workers.expected_of(config, f"{config.name}/workers.token")


def test_a_node_with_the_store_the_code_and_the_model_has_no_problems(tmp_path: Path) -> None:
    expected = expected_for(tmp_path)
    assert find_problems(expected) == []
    require_token(expected)
    remove_token(expected)
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == []


def test_a_node_says_what_it_lacks(tmp_path: Path) -> None:
    expected = expected_for(tmp_path / "shared")
    elsewhere = expected.config.model_copy(update={"root": str(tmp_path / "local")})
    (problem,) = find_problems(replace(expected, config=elsewhere))
    assert problem.startswith(
        f"it does not see the store: {tmp_path / 'local'} has no token of this run there; set root"
    )
    revision = {"version": "0.2.9", "revision": "0123456789abcdef+"}
    (problem,) = find_problems(replace(expected, code=revision))
    assert problem.startswith("it runs ogls-sd")
    assert problem.endswith("and the driver ogls-sd 0.2.9 at 0123456789ab+: install the same version")


def test_a_node_compares_the_model_by_its_content(tmp_path: Path) -> None:
    shutil.copytree(REPO / "data/tiny/model", tmp_path / "model")
    expected = expected_for(tmp_path / "store", f"model.path={tmp_path / 'model'}")
    with open(tmp_path / "model/config.json", "a") as file:
        file.write("\n")
    (problem,) = find_problems(expected)
    assert problem.startswith("model.path differs from that of the driver (content:")
    shutil.rmtree(tmp_path / "model")
    assert "model.path" in find_problems(expected)[0]


def test_a_worker_of_a_former_driver_writes_nothing(tmp_path: Path) -> None:
    former = expected_for(tmp_path)
    current = expected_for(tmp_path)
    require_token(current)
    with pytest.raises(StoreError, match="run tiny: this worker belongs to a process that has ended or lost the run"):
        require_token(former)
    remove_token(former)  # is not its own any more
    require_token(current)


def test_a_worker_keeps_its_model_between_stages_and_rounds(
    tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = Policy.__init__
    monkeypatch.setattr(Policy, "__init__", lambda self, *a, **k: loads.append("") or load(self, *a, **k))
    shutil.copytree(finished.store.root, tmp_path / "store")
    expected = expected_for(tmp_path / "store")
    run, worker = Run(expected.config), Worker(expected, threads=1)

    def computes(work: Any, table: str, round_: int, items: list[Any]) -> None:
        stored = run.records.manifest(table, round_)
        assert stored
        job = Job(expected.config, round_, table, 0, workers.partial(workers._open_work, work))
        (finished,) = worker.carry_out(job, divide(items, len(items)))
        entry = finished.entry
        assert entry.sha256 == stored.files_of(table)[0].sha256

    for round_ in (1, 2):
        prompter = run.prompter(sample.load_tokenizer(run.config.model))
        chosen = sample.select_round_problems(run.problems("train"), 8, round_, run.config.seed)
        requests = sample.build_requests(chosen, prompter, 4, run.config.seed, "rollout", round_)
        computes(sample.SampleWork, "trajectories", round_, requests[:16])
        planner, problems = teach.context_planner(run), {p.problem_id: p for p in run.problems("train")}
        plans = [planner.group(problems[n], g) for n, g in teach.read_groups(run, round_).items()]
        computes(teach.TeachWork, "teacher_states", round_, [p.scored for p in plans[:4]])
        worker.rest()
    assert len(loads) == 1


def cluster_config(*overrides: str) -> RunConfig:
    return build_config({"evaluate": {"benchmarks": [{}]}}, list(overrides))


CPU_NODE, GPU_NODE = Node("a" * 56, "one", 4, 0), Node("b" * 56, "two", 8, 2)


def test_a_worker_has_a_gpu_where_there_is_one() -> None:
    auto = cluster_config()
    assert find_room(auto, [CPU_NODE]).workers([CPU_NODE]) == 4
    assert find_room(auto, [CPU_NODE, GPU_NODE]).workers([CPU_NODE, GPU_NODE]) == 2
    assert find_room(cluster_config("model.device=cpu"), [GPU_NODE]).workers([GPU_NODE]) == 8
    parallel = cluster_config("rollout.engine=vllm", "rollout.vllm.tensor_parallel=2")
    assert find_room(parallel, [GPU_NODE]).workers([GPU_NODE]) == 1
    assert find_room(parallel, [CPU_NODE]).workers([CPU_NODE]) == 4  # on a CPU, vLLM has one process


def test_a_cluster_without_the_devices_of_a_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of the 1 nodes of the Ray cluster has a GPU"):
        find_room(cluster_config("model.device=cuda"), [CPU_NODE])
    four = cluster_config("rollout.engine=vllm", "rollout.vllm.tensor_parallel=4")
    with pytest.raises(ConfigError, match=r"a worker needs 4 GPUs of one node .* of 2 nodes, two \(bbbbbbbb\), has 2:"):
        find_room(four, [CPU_NODE, GPU_NODE])
    small = cluster_config("rollout.engine=vllm", "rollout.vllm.tensor_parallel=2", "execution.worker_devices=1")
    with pytest.raises(ConfigError, match=r"tensor_parallel is 2, and execution\.worker_devices gives a worker 1"):
        find_room(small, [GPU_NODE])


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ogls-sd\[ray\]'; or set execution.workers = local"):
        require_ray()
    run = Run(small_config(tmp_path, "execution.workers=ray"))
    with pytest.raises(ConfigError, match="which is not installed"):
        workers.shared_pool(run)


def test_ray_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not supported: start the run on a node of the cluster"):
        cluster_config("execution.address=ray://head:10001")


def test_a_worker_writes_under_the_epoch_of_the_process_that_holds_the_run(finished: Run, tmp_path: Path) -> None:
    """In an object store, the folder of the epoch keeps the files of two holders apart."""
    rows = finished.records.read("verdicts", 1)
    records = Store(str(tmp_path)).run("tiny")
    entries = [ShardWriter(records, VERDICTS, 1, epoch).write(3, rows, {"n": 1}) for epoch in (0, 7)]
    folder = "verdicts/round=001"
    assert [e.path for e in entries] == [f"{folder}/part-0003.parquet", f"{folder}/e7/part-0003.parquet"]
    assert entries[0].sha256 == entries[1].sha256
    assert records.read_shard(entries[1]).equals(rows)


def test_shards_do_not_mix_values() -> None:
    items = [("a", 1), ("a", 2), ("a", 3), ("b", 4)]
    assert [[n for _, n in s.items] for s in divide(items, 2, by=lambda i: i[0])] == [[1, 2], [3], [4]]
    assert divide([], 0) == []


def test_auto_finds_the_cluster_of_ray_start_and_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_cluster._running_address() == ""
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray/ray_current_cluster").write_text(address)
        assert ray_cluster._running_address() == address
    assert ray_cluster._running_address() == ""  # it has ended
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_cluster._running_address() == "head:6379"


class FakePool:
    """A pool whose first shard is under way for ever, or whose cluster is lost."""

    def __init__(self, expected: node_check.Expected, lost: bool):
        self.expected, self.lost, self.ended, self.closed = expected, lost, False, False

    def carry_out(self, job: Job, shards: Sequence[Shard], notice: Any) -> Iterator[FinishedShard]:
        try:
            if self.lost:
                raise ClusterUnavailable("no worker has started")
            while True:
                yield FinishedShard((False, 0), FileEntry("verdicts/x", "verdicts", 1, 1, "0"), {})
        finally:
            self.ended = True

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("lost", [False, True])
def test_an_error_ends_the_shards_that_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    run = Run(small_config(tmp_path, "execution.workers=ray"))
    pool = FakePool(expected_for(tmp_path), lost)
    monkeypatch.setattr(workers, "shared_pool", lambda run: pool)
    monkeypatch.setattr(workers, "_pool", pool)

    def progress(done: int, total: int) -> None:
        raise StoreError("the disk is full")

    with pytest.raises(ClusterUnavailable if lost else StoreError):
        carry_out_shards(run, print, StageWriter(run.records, VERDICTS, 1, "f"), divide([1, 2], 1), 1, progress)
    assert pool.ended
    assert pool.closed == lost  # a retry of the stage connects to the cluster anew
    assert workers._pool is (None if lost else pool)


def test_a_stage_with_a_shard_that_nobody_computed_is_not_done(tmp_path: Path) -> None:
    class Forgetful(OneByOne):
        def compute(self, items: Sequence[Any], progress: Any) -> ShardOutput:
            return ShardOutput(VERDICTS.schema.empty_table())

        def outputs(self, shards: Any, progress: Any) -> Any:
            return super().outputs(shards[1:], progress)

        def close(self) -> None:
            pass

    run = Run(small_config(tmp_path))
    with pytest.raises(StoreError, match="1 of 2 shards were not computed; run the same command again"):
        carry_out_shards(
            run, lambda *_: Forgetful(), StageWriter(run.records, VERDICTS, 1, "f"), divide([1, 2], 1), 1, print
        )


@pytest.mark.parametrize(("recorded", "row"), [(4, "| - | 4 | 0.0 | - |"), (None, "| CPU | 4 | 2.0 | 50 |")])
def test_what_workers_did_is_shown_also_as_older_releases_recorded_it(
    finished: Run, monkeypatch: pytest.MonkeyPatch, recorded: int | None, row: str
) -> None:
    manifest = finished.records.manifest("trajectories", 1)
    assert manifest
    did = recorded or {"device": "CPU", "shards": 4, "seconds": 2.0, "tokens": 100}
    changed = replace(manifest, metrics={**manifest.metrics, "workers": {"host/1": did}})
    monkeypatch.setattr(type(finished.records), "manifest", lambda self, table, _: changed)
    assert f"| sample | host/1 {row}" in workers_markdown(finished.records, 1)
