"""The store on an S3-compatible server: the same bits despite SlowDown answers, errors, cut uploads and SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from conftest import REPO, UNGRADED, again, carry_out, content, small_config
from s3server import CREDENTIALS, S3Server
from survivor import attempt

from ogls.config.sampling import RolloutConfig
from ogls.errors import ConfigError, RunLocked, StoreError, StoreUnavailable, UserError
from ogls.records import VERDICTS
from ogls.records.schema import to_arrow
from ogls.stages.run import Run
from ogls.store import RunStore, Store, lease, run_query
from ogls.store.writer import StageWriter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = S3Server()
        yield server
        server.stop()


@pytest.fixture
def root(server: S3Server) -> str:
    server.fault_rate = 0.0
    return server.bucket(f"bucket-{uuid4().hex[:12]}")


def test_a_run_through_a_failing_server_ends_with_the_same_bits(
    finished: Run, server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault_rate = 0.04
    monkeypatch.setattr(RolloutConfig, "decodes_together", lambda *_: True)  # so that round 2 is sampled ahead
    config = small_config(root)
    with Run(config).records.lock("train"):
        run = carry_out(config, ahead=True)
    sampled = run.records.manifest("trajectories", 2)
    assert sampled
    assert sampled.metrics["seconds_beside"] > 0
    assert {"slow down", "server error", "cut"} <= set(server.counts)
    without_epoch = {name: [f.replace("/e1/", "/") for f in files] for name, files in content(run).items()}
    assert without_epoch == content(finished)
    assert {reused for reused, _ in again(run).values()} == {True}


def test_queries_read_the_bucket_and_nothing_else(root: str, server: S3Server) -> None:
    run = carry_out(small_config(root), rounds=1)
    store = run.store
    answer = run_query(store, "SELECT round, count(*) AS n FROM trajectories GROUP BY round")
    assert answer.to_pylist() == [{"round": 1, "n": 32}]
    assert [r.name for r in store.runs()] == ["tiny"]
    other_store = Store(server.bucket("somebody-elses"))
    other_store.storage.write_bytes("x/secret.csv", b"a\n1\n")
    for source in ("s3://somebody-elses/runs/x/secret.csv", str(REPO / "README.md")):
        with pytest.raises(UserError, match=r"disabled|not allowed|Permission"):
            run_query(store, f"SELECT * FROM read_csv('{source}')")


_NIGHTLY = [pytest.param(stage, marks=pytest.mark.nightly) for stage in ("sample", "teach")]


@pytest.mark.parametrize("stage", [*_NIGHTLY, "train"])
def test_a_killed_run_resumes_to_the_same_result(finished: Run, root: str, stage: str) -> None:
    assert attempt(root, stage, 1) == -signal.SIGKILL
    assert content(carry_out(small_config(root))) == content(finished)


def test_an_upload_that_is_cut_leaves_no_object(server: S3Server, root: str) -> None:
    """The writer of a multipart upload is killed between two parts: neither the object nor a part of it exists."""
    script = (
        "import obstore, os, sys, signal; from ogls.store import Store\n"
        "parts = (b'x' * (6 << 20) if i < 9 else os.kill(os.getpid(), signal.SIGKILL) for i in range(10))\n"
        "obstore.put(Store(sys.argv[1]).storage.store, 'runs/big', parts, max_concurrency=1)\n"
    )
    answered_before = server.counts["answered"]
    killed = subprocess.run([sys.executable, "-c", script, root], check=False, cwd=REPO)
    assert killed.returncode == -signal.SIGKILL
    assert server.counts["answered"] - answered_before >= 2  # the upload was started, and at least one part arrived
    store = Store(root)
    assert store.storage.read_bytes("big") is None
    assert store.storage.list_names("") == []


def test_a_server_that_does_not_respond_raises_store_unavailable(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ogls.store.remote._RETRIES", 0)
    unreachable = Store("s3://bucket/runs?endpoint_override=http://127.0.0.1:1")
    for operation in (
        lambda: unreachable.storage.read_bytes("x"),
        lambda: unreachable.storage.write_bytes("x", b""),
        lambda: unreachable.storage.list_names("x"),
    ):
        with pytest.raises(StoreUnavailable, match="s3://bucket/runs/x"):
            operation()
    with pytest.raises(StoreError, match="NoSuchBucket; create the bucket") as missing_bucket:
        Store(root.replace("bucket-", "no-bucket-")).storage.write_bytes("x", b"1")
    assert not isinstance(missing_bucket.value, StoreUnavailable)  # a retry cannot succeed


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/runs", "s3://bucket/runs?password=secret"])
def test_an_s3_url_with_credentials_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 2.0), ("RENEW_SECONDS", 0.5)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.mark.parametrize("jump", [0.0, 3600.0, -3600.0])
def test_a_live_holder_keeps_its_run_when_the_clock_jumps(
    root: str, short_lease: None, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    run = Store(root).run("held")
    real_time = time.time
    with run.lock("train"):
        time.sleep(2.5)  # longer than the first lease, so the lease has been renewed
        monkeypatch.setattr(lease.time, "time", lambda: real_time() + jump)
        # The holder renews by the same clock, as on a machine whose time was set.
        with pytest.raises(RunLocked, match="is held by process"), run.lock("train"):
            pass
    monkeypatch.setattr(lease.time, "time", real_time)
    with run.lock("train"):
        pass


def test_the_lease_of_a_dead_holder_expires_whatever_the_clock(root: str, short_lease: None) -> None:
    run = Store(root).run("held")
    dead = b'{"pid": 1, "host": "gone", "purpose": "train", "since": "-", "epoch": 3, "expires": 9999999999}'
    run.storage.write_bytes("held/lease.json", dead)
    with run.lock("train"):
        pass


_STOPPED_IN_COMMIT = """
import os, signal, sys
from test_s3 import write_stage
from ogls.store import Store, lease
from ogls.store.storage import Storage
lease.LEASE_SECONDS, lease.RENEW_SECONDS = 2.0, 0.5
real = Storage._put_if
def put(self, path, data, tag):
    if path.endswith("manifest.json") and b'"stage": "verify"' in data:
        os.kill(os.getpid(), signal.SIGSTOP)  # every check is done; the request is not sent yet
    return real(self, path, data, tag)
Storage._put_if = put
run = Store(sys.argv[1]).run("held")
with run.lock("first"):
    write_stage(run, "first")
"""


def write_stage(run: RunStore, answer: str) -> None:
    row = {"problem_id": "p", "sample": 0, "verdict": "correct", "outcome": "correct", "answer": answer, **UNGRADED}
    writer = StageWriter(run, VERDICTS, 1, "f")
    writer.write_shard(0, to_arrow(VERDICTS, [row]))
    writer.commit("verify", {})


def test_a_holder_that_wakes_up_in_a_commit_after_its_successor_writes_nothing(root: str, short_lease: None) -> None:
    """The process is stopped for longer than its lease, just before it sends its manifest."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    command = [sys.executable, "-c", _STOPPED_IN_COMMIT, root]
    with subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True) as first:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        run = Store(root).run("held")
        with pytest.raises(RunLocked, match=f"process {first.pid} on"), run.lock("too early"):
            pass
        time.sleep(2.0)
        with run.lock("second"):
            write_stage(run, "second")
            before = {name: run.storage.read_bytes(name) for name in run.storage.list_files("")}
            os.kill(first.pid, signal.SIGCONT)
            _, errors = first.communicate(timeout=60)
            after = {name: run.storage.read_bytes(name) for name in run.storage.list_files("")}
    assert first.returncode == 1
    assert "this process lost run held: it did not renew its lease in time, and process" in errors
    assert json.loads(after.pop("held/lease.json") or b"")["epoch"] == 2
    before.pop("held/lease.json")
    assert after == before
    assert run.read("verdicts", 1)["answer"].to_pylist() == ["second"]


def test_looking_at_the_runs_writes_nothing(root: str) -> None:
    run = Store(root).run("held")
    with run.lock("train"):
        lease = run.storage.read_bytes("held/lease.json")
        assert "process" in str(Store(root).run("held").describe_holder())
        assert run.storage.read_bytes("held/lease.json") == lease
