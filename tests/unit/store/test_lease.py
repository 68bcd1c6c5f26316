"""The lease on stores without locks: only one process holds a run, even if processes pause between their steps."""

from __future__ import annotations

import json
import random
import threading
import time
from uuid import uuid4

import pytest

from ogls.errors import RunLocked
from ogls.store import RunStore, Store, lease
from ogls.store.storage import Storage


class SlowStorage(Storage):
    """A storage that delays every call by a random time."""

    def __init__(self, root: str, seed: int):
        super().__init__(root)
        self.random = random.Random(seed)

    def _delay(self) -> None:
        time.sleep(self.random.choice((0.0, 0.01, 0.1)))

    def read_bytes(self, path: str) -> bytes | None:
        self._delay()
        return super().read_bytes(path)

    def write_bytes(self, path: str, data: object) -> None:
        self._delay()
        super().write_bytes(path, data)  # type: ignore[arg-type]

    def list_names(self, path: str) -> list[str]:
        self._delay()
        return super().list_names(path)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    return f"memory://{uuid4().hex}"


@pytest.mark.parametrize("seed", range(8))
def test_one_of_many_simultaneous_requests_gets_the_run(root: str, seed: int) -> None:
    """The holder keeps the run until the four others are refused; a second holder would fail the assertions."""
    start, holders, refused, all_refused = threading.Barrier(5), [], [], threading.Event()

    def request(number: int) -> None:
        run = RunStore(SlowStorage(root, seed * 10 + number), "held")
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
    with Store(root).run("held").lock("afterwards"):
        pass
    assert Store(root).storage.list_names("held/lock") == []


def test_an_expired_claim_is_ignored_and_removed(root: str) -> None:
    run = _run_with_claim(root, "0-smallest", held=False, expires_in=-1.0)
    with run.lock("train"):
        assert [json.loads(run.storage.read_bytes(f"held/lock/{n}") or b"")["purpose"] for n in _claims(run)] == [
            "train"
        ]
    assert _claims(run) == []


def test_a_claim_with_a_larger_name_is_waited_for_and_may_win(root: str) -> None:
    """Its process read the claims before this claim was written, so it may hold the run."""
    run = _run_with_claim(root, "z-largest", held=False)
    timer = threading.Timer(0.3, lambda: _run_with_claim(root, "z-largest", held=True))
    timer.start()
    started = time.monotonic()
    with pytest.raises(RunLocked, match=r"process 7 on elsewhere \(train, since -\)"), run.lock("second"):
        pass
    assert time.monotonic() - started > 0.25
    assert _claims(run) == ["z-largest.json"]
    assert "process 7 on elsewhere" in str(run.describe_holder())


def test_an_unreadable_claim_is_dead(root: str) -> None:
    run = Store(root).run("held")
    for name, raw in (("a", b"{"), ("b", b"[]"), ("c", b'{"expires": "soon"}')):
        run.storage.write_bytes(f"held/lock/{name}.json", raw)
    assert run.describe_holder() is None
    with run.lock("train"):
        assert len(_claims(run)) == 1


def _run_with_claim(root: str, name: str, *, held: bool, expires_in: float = 60.0) -> RunStore:
    run = Store(root).run("held")
    info = {"pid": 7, "host": "elsewhere", "purpose": "train", "since": "-"}
    claim = {**info, "held": held, "expires": time.time() + expires_in}
    run.storage.write_bytes(f"held/lock/{name}.json", json.dumps(claim).encode())
    return run


def _claims(run: RunStore) -> list[str]:
    return run.storage.list_names("held/lock")
