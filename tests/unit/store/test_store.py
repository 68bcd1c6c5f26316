"""The store: manifests mark finished stages, damage is detected, writes are atomic, one process holds a run."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import UNGRADED, small_config

from ogls.errors import DataError, RunLocked, StoreError
from ogls.records import TABLES, VERDICTS
from ogls.records.schema import SCHEMA_VERSION, to_arrow
from ogls.store import RunStore, Store
from ogls.store.removal import remove_run, run_bytes
from ogls.store.storage import Storage
from ogls.store.writer import StageWriter


def rows(n: int, start: int = 0) -> pa.Table:
    return to_arrow(
        VERDICTS,
        [
            {
                "problem_id": "p",
                "sample": start + i,
                "verdict": "correct",
                "outcome": "correct",
                "answer": None,
                **UNGRADED,
            }
            for i in range(n)
        ],
    )


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"
    return Store(root).run("r")


def write(run: RunStore, fingerprint: str = "f", shards: int = 2) -> None:
    writer = StageWriter(run, VERDICTS, 1, fingerprint)
    for i in range(shards):
        if i not in writer.finished:
            writer.write_shard(i, rows(3, 3 * i), {"n": 3})
    writer.commit("verify", {"extra": "yes"})


def test_a_stage_is_done_when_its_manifest_exists(run: RunStore) -> None:
    assert run.status("verdicts", 1, "f").state == "missing"
    writer = StageWriter(run, VERDICTS, 1, "f")
    writer.write_shard(0, rows(3), {"n": 3})
    assert run.status("verdicts", 1, "f").state == "missing"
    with pytest.raises(StoreError, match="run the stage verify first"):
        run.read("verdicts", 1)
    writer.commit("verify", {})
    assert run.status("verdicts", 1, "f").state == "done"
    assert run.status("verdicts", 1, "other").state == "changed"
    assert run.read("verdicts", 1)["sample"].to_pylist() == [0, 1, 2]


def test_metrics_of_shards_are_summed(run: RunStore) -> None:
    write(run)
    manifest = run.manifest("verdicts", 1)
    assert manifest.metrics == {"n": 6, "extra": "yes"}
    assert manifest.rows == 6


def test_finished_shards_of_an_interrupted_stage_are_kept(run: RunStore) -> None:
    StageWriter(run, VERDICTS, 1, "f").write_shard(0, rows(3), {"n": 3})
    again = StageWriter(run, VERDICTS, 1, "f")
    assert list(again.finished) == [0]
    again.write_shard(1, rows(3, 3), {"n": 3})
    again.commit("verify", {})
    assert run.read("verdicts", 1)["sample"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert run.manifest("verdicts", 1).metrics["n"] == 6


def test_shards_of_another_fingerprint_are_not_kept(run: RunStore) -> None:
    StageWriter(run, VERDICTS, 1, "f").write_shard(1, rows(3))
    other = StageWriter(run, VERDICTS, 1, "g")
    assert other.finished == {}
    other.write_shard(0, rows(1))
    other.commit("verify", {})
    assert run.read("verdicts", 1).num_rows == 1
    names = run.storage.list_names("r/verdicts/round=001")
    assert names == ["manifest.json", "part-0000.parquet"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest"])
def test_damage_is_found(run: RunStore, damage: str) -> None:
    write(run)
    part = "r/verdicts/round=001/part-0001.parquet"
    content = run.storage.read_bytes(part)
    if damage == "missing":
        run.storage.remove(part)
    elif damage == "truncated":
        run.storage.write_bytes(part, content[:-5])
    elif damage == "flipped":
        run.storage.write_bytes(part, content[:50] + bytes([content[50] ^ 1]) + content[51:])
    else:
        manifest = run.storage.read_bytes("r/verdicts/round=001/manifest.json")
        run.storage.write_bytes("r/verdicts/round=001/manifest.json", manifest[: len(manifest) // 2])
    status = run.status("verdicts", 1, "f")
    assert status.state == "damaged"
    reasons = {"missing": "is missing", "truncated": "bytes instead of", "flipped": "another checksum"}
    assert reasons.get(damage, "cannot be read") in status.why


def test_the_same_rows_give_the_same_bytes(run: RunStore) -> None:
    write(run)
    first = run.manifest("verdicts", 1)
    write(run)
    assert [f.sha256 for f in run.manifest("verdicts", 1).files] == [f.sha256 for f in first.files]
    assert run.manifest("verdicts", 1).digest == first.digest


def test_descriptions_of_columns_are_not_in_the_files(run: RunStore, tmp_path: Path) -> None:
    write(run)
    (entry, _) = run.manifest("verdicts", 1).files
    content = run.storage.read_bytes(f"r/{entry.path}")
    stored = pq.read_schema(pa.BufferReader(content))
    assert b"about" not in content
    assert stored.metadata[b"ogls_schema_version"] == str(SCHEMA_VERSION).encode()
    assert run.read("verdicts", 1).schema.equals(VERDICTS.schema, check_metadata=True)


def test_a_full_disk_leaves_no_partly_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Store(str(tmp_path)).run("r")
    writer = StageWriter(run, VERDICTS, 1, "f")
    writer.write_shard(0, rows(3))

    def raise_disk_full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(StoreError, match=r"part-0001\.parquet: the disk is full: free some space, then run the same"):
        writer.write_shard(1, rows(3))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["part-0000.parquet", "partial.json"]
    assert list(StageWriter(run, VERDICTS, 1, "f").finished) == [0]


def test_a_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match="set root to another folder"):
        store.run("r").open(small_config(tmp_path))
    with pytest.raises(StoreError, match="cannot write"), store.run("r").lock("test"):
        pass


def test_rows_that_do_not_fit_the_schema_are_refused() -> None:
    valid_row = rows(1).to_pylist()[0]
    with pytest.raises(DataError, match=r"verdicts: missing \['answer'\], unknown \['anwser'\]"):
        to_arrow(VERDICTS, [{"anwser" if k == "answer" else k: v for k, v in valid_row.items()}])
    with pytest.raises(DataError, match=r"verdicts\.verdict: 1 of 1 values are null"):
        to_arrow(VERDICTS, [{**valid_row, "verdict": None}])
    with pytest.raises(DataError, match="verdicts"):
        to_arrow(VERDICTS, [{**valid_row, "sample": "three"}])


def test_a_name_with_another_configuration_is_refused(run: RunStore) -> None:
    run.open(small_config("x", "name=r"))
    run.open(small_config("x", "name=r", "rounds=7", "tracking.uri=http://elsewhere"))
    StageWriter(run, TABLES["problems"], 0, "f").commit("prepare", {})
    with pytest.raises(StoreError, match=r"train\.learning_rate: .* -> 0\.25"):
        run.open(small_config("x", "name=r", "train.learning_rate=0.25"))


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("b", "c", "a"):
        store.run(name).open(small_config(tmp_path, f"name={name}"))
    (tmp_path / "stray").mkdir()
    assert [r.name for r in store.runs()] == ["b", "c", "a"]


def test_a_held_run_is_refused_with_the_name_of_the_holder(run: RunStore) -> None:
    second = Store(run.storage.root).run("r")
    with run.lock("train"):
        if run.storage.local:
            assert f"process {os.getpid()}" in run.describe_holder()
        with pytest.raises(RunLocked, match=rf"process {os.getpid()} on .*\(train, since"), second.lock("second"):
            pass
    with run.lock("afterwards"):
        pass
    assert run.describe_holder() is None


def test_a_killed_holder_frees_the_run(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from ogls.store import Store\n"
        f"with Store({str(tmp_path)!r}).run('r').lock('x'):\n    print('held', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        run = Store(str(tmp_path)).run("r")
        assert f"process {child.pid}" in run.describe_holder()
        with pytest.raises(RunLocked, match=f"process {child.pid}"), run.lock("y"):
            pass
        child.kill()
    with run.lock("y"):
        assert os.getpid() != child.pid


@pytest.mark.parametrize("looks", ["once, for long", "all the time"])
def test_looking_at_the_holder_never_refuses_a_starting_training(tmp_path: Path, looks: str) -> None:
    """`ogls runs` takes a shared lock for a moment; the process that starts waits for it."""
    run, stop = Store(str(tmp_path)).run("r"), threading.Event()
    with run.lock("earlier"):
        pass

    def look() -> None:
        while not stop.is_set():
            run.describe_holder()

    with open(tmp_path / "r/lock.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        thread = threading.Thread(target=look)
        if looks == "all the time":
            thread.start()
        try:
            for _ in range(1 if looks == "once, for long" else 300):
                with run.lock("train"):
                    assert "(train, since" in str(run.describe_holder())
        finally:
            stop.set()
            if thread.ident:
                thread.join()


def test_every_table_can_be_read_while_empty(run: RunStore) -> None:
    StageWriter(run, VERDICTS, 1, "f").commit("verify", {})
    assert run.read("verdicts", 1).schema.equals(TABLES["verdicts"].schema)


def test_a_removal_that_is_killed_leaves_no_run_and_no_finished_stage(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.open(small_config("x", "name=r"))
    for table, stage in (("problems", "prepare"), ("scores", "evaluate")):
        writer = StageWriter(run, TABLES[table], 0, "f")
        writer.attach_file("policy", f"{stage}.bin", b"content")
        writer.commit(stage, {})
    assert run_bytes(run) == 2 * len(b"content")
    real, removed = Storage.remove, []

    def remove(storage: Storage, path: str) -> None:
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path)
        real(storage, path)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            remove_run(run)
    assert run.read_info() is None
    assert run.rounds("problems") == run.rounds("scores") == []
    assert "r" not in [r.name for r in Store(run.storage.root).runs()]
    remove_run(run)
    assert run.storage.list_files("r") == []
