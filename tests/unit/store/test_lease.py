"""The lease in object stores: one process holds a run, and no write of a former holder lands, wherever it wakes up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
from conftest import UNGRADED, small_config

from ogls.errors import ConfigError, RunLocked, StoreError, StoreUnavailable
from ogls.records import VERDICTS
from ogls.records.schema import to_arrow
from ogls.store import RunStore, Store, lease
from ogls.store.storage import Storage
from ogls.store.writer import StageWriter

_REQUESTS = ("read_tagged", "write_bytes", "_put_if", "remove", "list_names", "list_files")


class WatchedStorage(Storage):
    """A storage that calls `before(name, path)` before every request to the store."""

    def __init__(self, root: str, before: Callable[[str, str], None]):
        super().__init__(root)
        for name in _REQUESTS:
            setattr(self, name, self._watch(name, before))

    def _watch(self, name: str, before: Callable[[str, str], None]) -> Callable[..., Any]:
        request = getattr(super(), name)

        def watched(path: str, *arguments: Any) -> Any:
            before(name, path)
            return request(path, *arguments)

        return watched


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    return f"memory://{uuid4().hex}"


def rows(answer: str) -> pa.Table:
    row = {"problem_id": "p", "sample": 0, "verdict": "correct", "outcome": "correct", "answer": answer, **UNGRADED}
    return to_arrow(VERDICTS, [row])


def run_stage(run: RunStore, answer: str) -> None:
    """What a stage writes: two shards, an attached file, the manifest."""
    run.write_json("mlflow.json", {"by": answer})
    writer = StageWriter(run, VERDICTS, 1, "f")
    for index in range(2):
        if index not in writer.finished:
            writer.write_shard(index, rows(answer), {"n": 1})
    writer.attach_file("policy", "adapter.bin", answer.encode())
    writer.commit("verify", {"by": answer})


def write_lease(run: RunStore, **content: Any) -> None:
    info = {"pid": 7, "host": "elsewhere", "purpose": "train", "since": "-", "holder": "x", "epoch": 3}
    run.storage.write_bytes(f"{run.name}/lease.json", json.dumps({**info, **content}).encode())


@pytest.mark.parametrize("seed", range(4))
def test_one_of_many_simultaneous_requests_gets_the_run(root: str, seed: int) -> None:
    """The holder keeps the run until the four others are refused; a second holder would fail the assertions."""
    start, holders, refused, all_refused = threading.Barrier(5), [], [], threading.Event()

    def request(number: int) -> None:
        delays = random.Random(seed * 10 + number)
        run = RunStore(WatchedStorage(root, lambda *_: time.sleep(delays.choice((0.0, 0.01, 0.05)))), "held")
        start.wait()
        try:
            with run.lock(f"train {number}"):
                holders.append(number)
                assert all_refused.wait(20)
        except RunLocked as error:
            refused.append(str(error))
            if len(refused) == 4:
                all_refused.set()

    threads = [threading.Thread(target=request, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(holders), len(refused)) == (1, 4)
    assert all("run held is held by process" in text for text in refused)


def test_every_holder_has_a_larger_epoch_and_frees_the_run(root: str) -> None:
    run = Store(root).run("held")
    for epoch in (1, 2, 3):
        with run.lock("train"):
            assert run.lease
            assert run.lease.epoch == epoch
            assert "(train, since" in str(run.describe_holder())
        assert run.describe_holder() is None
        assert run.lease is None


def test_an_expired_lease_is_taken_and_a_renewed_one_is_not(root: str) -> None:
    run = Store(root).run("held")
    write_lease(run, expires=time.time() - 1)
    with run.lock("train"):
        assert run.lease
        assert run.lease.epoch == 4
    write_lease(run, expires=time.time() - 1)  # it has expired by our clock, but its holder renews it
    timer = threading.Timer(0.1, lambda: write_lease(run, expires=time.time() - 0.5))
    timer.start()
    with pytest.raises(RunLocked, match=r"process 7 on elsewhere \(train, since -\)"), run.lock("second"):
        pass


def test_an_unreadable_lease_is_dead(root: str) -> None:
    run = Store(root).run("held")
    for raw in (b"{", b"[]", b'{"expires": "soon"}'):
        run.storage.write_bytes("held/lease.json", raw)
        assert run.describe_holder() is None
        with run.lock("train"):
            assert run.describe_holder()


def test_a_holder_that_wakes_up_at_any_request_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the n-th request of a stage, the holder stops; a successor takes the run, does the stage and goes on.

    Then the first one wakes up: it raises, and every file is what the successor wrote. Its own shards remain only in
    the folder of its epoch, which no manifest lists.
    """
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
    stopped_at = []
    for number in range(1000):
        root, count, kept = f"memory://{uuid4().hex}", 0, {}

        def before(name: str, path: str, number: int = number, root: str = root, kept: dict = kept) -> None:
            nonlocal count
            count += 1
            if count != number + 1:
                return
            stopped_at.append(f"{name} {path}")
            monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
            with monkeypatch.context() as patch:
                patch.setattr(lease, "_held", {})
                successor = Store(root).run("r")
                with successor.lock("second"):
                    if not successor.status("verdicts", 1, "f").manifest:
                        run_stage(successor, "second")
                    successor.write_json("run.json", {"created": "second"})
                kept.update(files(root))
            monkeypatch.setattr(lease, "RENEW_SECONDS", 3600.0)  # so that `check` does not find out earlier

        monkeypatch.setattr(lease, "RENEW_SECONDS", 3600.0)
        first = RunStore(WatchedStorage(root, lambda *_: None), "r")
        with first.lock("first"):
            first.write_json("run.json", {"created": "first"})
            first.storage = WatchedStorage(root, before)
            first.lease.storage = first.storage
            error = ""
            try:
                run_stage(first, "first")
            except RunLocked as lost:
                error = str(lost)
            if kept and first.manifest("verdicts", 1).metrics["by"] == "second":
                assert "this process lost run r" in error
                assert "(second, since" in error
        if not kept:
            break
        found = files(root)
        added = {name for name in found if found[name] != kept.get(name)}
        assert all("/e1/" in name for name in added), stopped_at[-1]
        assert all(name in found or "/e1/" in name for name in kept), stopped_at[-1]
        run = Store(root).run("r")
        manifest = run.manifest("verdicts", 1)
        assert run.status("verdicts", 1, "f").state == "done"
        assert not any(run.find_damage(entry) for entry in manifest.files)
        assert manifest.metrics["by"] == "second" or "manifest.json" not in stopped_at[-1]
    assert number > 20
    assert any("_put_if r/verdicts/round=001/manifest.json" in point for point in stopped_at)


def files(root: str) -> dict[str, bytes | None]:
    storage = Storage(root)
    return {name: storage.read_bytes(name) for name in storage.list_files("")}


def test_a_holder_whose_renewals_fail_stops_before_its_next_write(root: str) -> None:
    """It raises StoreUnavailable, which is retried, and goes on if nobody has taken the run in the meantime."""
    away = threading.Event()

    def before(*_: str) -> None:
        if away.is_set():
            raise StoreUnavailable("away")

    run = RunStore(WatchedStorage(root, before), "r")
    with run.lock("train"):
        away.set()
        time.sleep(0.5)
        for write in (lambda: run.write_json("x.json", {}), lambda: run.lease.check()):
            with pytest.raises(StoreUnavailable):
                write()
        away.clear()
        run_stage(run, "first")
    assert run.manifest("verdicts", 1).metrics["by"] == "first"


def test_a_lost_response_is_no_lost_run(root: str) -> None:
    """A conditional write that arrived although its response was lost succeeds; one that did not is repeated."""
    storage, lose = Storage(root), ["before", "after", "after"]
    real = storage._put_if

    def put(*arguments: Any) -> str:
        kind = lose.pop() if lose else ""
        if kind == "before":
            raise OSError("connection lost")
        tag = real(*arguments)
        if kind == "after":
            raise OSError("connection lost")
        return tag

    storage._put_if = put  # type: ignore[method-assign]
    run = RunStore(storage, "r")
    with run.lock("train"):
        lose += ["before", "after"]
        run_stage(run, "first")
    assert not lose
    assert run.manifest("verdicts", 1).metrics["by"] == "first"


def test_a_store_without_conditional_writes_is_refused(root: str) -> None:
    storage = Storage(root)
    storage._put_if = lambda path, data, _: storage.write_bytes(path, data) or {}  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="ignores or refuses conditional writes"), RunStore(storage, "r").lock("x"):
        pass
    with pytest.raises(ConfigError, match=r"hdfs:// is not supported; set root to a local folder, s3://bucket/path"):
        Store("hdfs://host/runs")
    with pytest.raises(ConfigError, match=r"az://box/runs: .*[Aa]ccount.* come from the environment"):
        Store("az://box/runs")


def test_the_next_holder_keeps_the_finished_shards(root: str) -> None:
    """Shards stay in the folder of the epoch that wrote them; the manifest lists both, and retention finds them."""
    run = Store(root).run("r")
    with run.lock("first"):
        run.open(small_config(root, "name=r"))
        StageWriter(run, VERDICTS, 1, "f").write_shard(0, rows("first"), {"n": 1})
    with run.lock("second"):
        run_stage(run, "second")
    folder = "verdicts/round=001"
    paths = [entry.path for entry in run.manifest("verdicts", 1).files_of("verdicts")]
    assert paths == [f"{folder}/e1/part-0000.parquet", f"{folder}/e2/part-0001.parquet"]
    assert run.read("verdicts", 1)["answer"].to_pylist() == ["first", "second"]
    assert run.storage.list_names(f"r/{folder}") == ["e1", "e2", "manifest.json", "partial.json"]
    assert run.read_info()["created"]
