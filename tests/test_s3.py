"""The store on an S3-compatible server: the same bits, through slow-downs, errors, cut uploads and SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from conftest import REPO, again, carry_out, content, small_config
from s3server import CREDENTIALS, S3Server
from survivor import attempt

from ogls.errors import ConfigError, RunLocked, StoreError, StoreUnavailable, UserError
from ogls.stages.run import Run
from ogls.store import Store, lease, run_query

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
    server.share = 0.0
    return server.bucket(f"bucket-{uuid4().hex[:12]}")


def test_a_run_through_a_failing_server_ends_with_the_same_bits(finished: Run, server: S3Server, root: str) -> None:
    server.share = 0.04
    run = carry_out(small_config(root))
    assert {"slow down", "server error", "cut"} <= set(server.seen)
    assert content(run) == content(finished)
    assert {reused for reused, _ in again(run).values()} == {True}


def test_queries_read_the_bucket_and_nothing_else(root: str, server: S3Server) -> None:
    run = carry_out(small_config(root), rounds=1)
    store = run.store
    answer = run_query(store, "SELECT round, count(*) AS n FROM trajectories GROUP BY round")
    assert answer.to_pylist() == [{"round": 1, "n": 32}]
    assert [r.name for r in store.runs()] == ["tiny"]
    other = Store(server.bucket("somebody-elses"))
    other.storage.write_bytes("x/secret.csv", b"a\n1\n")
    for source in ("s3://somebody-elses/runs/x/secret.csv", str(REPO / "README.md")):
        with pytest.raises(UserError, match=r"disabled|not allowed|Permission"):
            run_query(store, f"SELECT * FROM read_csv('{source}')")


@pytest.mark.parametrize("stage", ["sample", "teach", "train"])
def test_killed_and_resumed_to_the_same_end(finished: Run, root: str, stage: str) -> None:
    assert attempt(root, stage, 1) == -signal.SIGKILL
    assert content(carry_out(small_config(root))) == content(finished)


def test_an_upload_that_is_cut_leaves_no_object(server: S3Server, root: str) -> None:
    """A file of several parts, its writer killed between them: the object is not there, nor half of it."""
    script = (
        "import os, sys, signal; from ogls.store import Store\n"
        "out = Store(sys.argv[1]).storage.fs.open(Store(sys.argv[1]).storage.path + '/big', 'wb')\n"
        "out.write(b'x' * (24 << 20)); out.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = server.seen["answered"]
    killed = subprocess.run([sys.executable, "-c", script, root], check=False, cwd=REPO)
    assert killed.returncode == -signal.SIGKILL
    assert server.seen["answered"] - before >= 2  # begun, and a part or more arrived
    store = Store(root)
    assert store.storage.read_bytes("big") is None
    assert store.storage.list_names("") == []


def test_a_server_that_is_away_may_come_back(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ogls.store.storage._ATTEMPTS", 1)
    away = Store("s3://bucket/runs?endpoint_override=http://127.0.0.1:1")
    for act in (
        lambda: away.storage.read_bytes("x"),
        lambda: away.storage.write_bytes("x", b""),
        lambda: away.storage.list_names("x"),
    ):
        with pytest.raises(StoreUnavailable, match="s3://bucket/runs/x"):
            act()
    with pytest.raises(StoreError, match="NO_SUCH_BUCKET") as none:
        Store(root.replace("bucket-", "no-bucket-")).storage.write_bytes("x", b"1")
    assert not isinstance(none.value, StoreUnavailable)  # waiting does not make a bucket


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/runs", "s3://bucket/runs?password=secret"])
def test_an_s3_url_takes_no_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 2.0), ("RENEW_SECONDS", 0.5)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.mark.parametrize("jump", [0.0, 3600.0, -3600.0])
def test_a_living_holder_keeps_its_run_though_clocks_jump(
    root: str, quick: None, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    run = Store(root).run("held")
    real = time.time
    with run.lock("train"):
        time.sleep(2.5)  # past the first lease: it has been renewed
        monkeypatch.setattr(lease.time, "time", lambda: real() + jump)
        # The holder renews by the same jumped clock, as on a machine that got a new time.
        with pytest.raises(RunLocked, match="is held by process"), run.lock("train"):
            pass
    monkeypatch.setattr(lease.time, "time", real)
    with run.lock("train"):
        pass


def test_a_dead_holders_lease_lapses_whatever_the_clock(root: str, quick: None) -> None:
    run = Store(root).run("held")
    ahead = b'{"pid": 1, "host": "gone", "purpose": "train", "since": "-", "held": true, "expires": 9999999999}'
    run.storage.write_bytes("held/lock/gone.json", ahead)
    with run.lock("train"):
        pass
