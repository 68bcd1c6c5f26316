"""Who gets a run on a store without locks, however long each who asks is stalled between its steps."""

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


class Stalling(Storage):
    """A storage whose every call is late by a time of its own."""

    def __init__(self, root: str, seed: int):
        super().__init__(root)
        self.random = random.Random(seed)

    def _stall(self) -> None:
        time.sleep(self.random.choice((0.0, 0.01, 0.1)))

    def read_bytes(self, path: str) -> bytes | None:
        self._stall()
        return super().read_bytes(path)

    def write_bytes(self, path: str, data: object) -> None:
        self._stall()
        super().write_bytes(path, data)  # type: ignore[arg-type]

    def list_names(self, path: str) -> list[str]:
        self._stall()
        return super().list_names(path)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    return f"memory://{uuid4().hex}"


@pytest.mark.parametrize("seed", range(8))
def test_of_many_who_ask_at_once_one_gets_the_run(root: str, seed: int) -> None:
    """Whoever gets it keeps it until all others were refused: a second holder would wait for ever, and is counted."""
    asked, got, refused, all_refused = threading.Barrier(5), [], [], threading.Event()

    def ask(number: int) -> None:
        run = RunStore(Stalling(root, seed * 10 + number), "held")
        asked.wait()
        try:
            with run.lock(f"train {number}"):
                got.append(number)
                assert all_refused.wait(20)
        except RunLocked as error:
            refused.append(str(error))
            if len(refused) == 4:
                all_refused.set()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)
    assert all("run held is held by process" in text for text in refused)
    with Store(root).run("held").lock("afterwards"):
        pass
    assert Store(root).storage.list_names("held/lock") == []


def test_a_claim_that_is_not_renewed_counts_for_nothing_and_is_removed(root: str) -> None:
    run = _with_claim(root, "0-least", held=False, left=-1.0)
    with run.lock("train"):
        assert [json.loads(run.storage.read_bytes(f"held/lock/{n}") or b"")["purpose"] for n in _claims(run)] == [
            "train"
        ]
    assert _claims(run) == []


def test_a_greater_name_that_asks_is_waited_for_and_may_go_first(root: str) -> None:
    """It looked before this claim was written, and does not know of it."""
    run = _with_claim(root, "z-greatest", held=False)
    held = threading.Timer(0.3, lambda: _with_claim(root, "z-greatest", held=True))
    held.start()
    began = time.monotonic()
    with pytest.raises(RunLocked, match=r"process 7 on elsewhere \(train, since -\)"), run.lock("second"):
        pass
    assert time.monotonic() - began > 0.25
    assert _claims(run) == ["z-greatest.json"]
    assert "process 7 on elsewhere" in str(run.describe_holder())


def test_a_claim_that_nobody_can_read_is_dead(root: str) -> None:
    run = Store(root).run("held")
    for name, raw in (("a", b"{"), ("b", b"[]"), ("c", b'{"expires": "soon"}')):
        run.storage.write_bytes(f"held/lock/{name}.json", raw)
    assert run.describe_holder() is None
    with run.lock("train"):
        assert len(_claims(run)) == 1


def _with_claim(root: str, name: str, *, held: bool, left: float = 60.0) -> RunStore:
    run = Store(root).run("held")
    about = {"pid": 7, "host": "elsewhere", "purpose": "train", "since": "-"}
    claim = {**about, "held": held, "expires": time.time() + left}
    run.storage.write_bytes(f"held/lock/{name}.json", json.dumps(claim).encode())
    return run


def _claims(run: RunStore) -> list[str]:
    return run.storage.list_names("held/lock")
