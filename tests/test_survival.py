"""SIGKILL inside every stage: the resumed run ends as one that was never killed, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import psutil
import pytest
from conftest import ROUND, carry_out, content, small_config
from survivor import attempt

from ogls.errors import StoreError
from ogls.stages.run import Run
from ogls.verifiers.pool import Case, Verifier

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("where", ["progress", "commit"])
def test_killed_in_every_stage_and_resumed_to_the_same_end(finished: Run, tmp_path: Path, where: str) -> None:
    """One run, killed right before the end of each stage of its rounds; or between the shards of the longer ones."""
    kills = [("evaluate", 0), *((name, 1 + i % 2) for i, name in enumerate(ROUND))]
    kills.sort(key=lambda kill: kill[1])
    if where == "commit":
        kills.insert(0, ("prepare", 0))
    else:
        kills = [kill for kill in kills if kill[0] in ("sample", "verify", "teach", "train")]
    for stage, round_ in kills:
        assert attempt(tmp_path, stage, round_, where) == -signal.SIGKILL, f"{stage} r{round_} was not killed"
        written = {"sample": "trajectories", "teach": "teacher_states"}.get(stage)
        if written:
            folder = tmp_path / "tiny" / written / f"round={round_:03d}"
            assert (folder / "partial.json").exists()
            assert not (folder / "manifest.json").exists()
    assert attempt(tmp_path) == 0
    run = Run(small_config(tmp_path))
    assert content(run) == content(finished)
    assert run.policy_hash(2) == finished.policy_hash(2)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("partial.json"))


def test_out_of_memory_in_the_teacher_pass(finished: Run, tmp_path: Path) -> None:
    """A limit on the address space, so that an allocation of the teacher pass itself fails."""
    code = attempt(tmp_path, "teach", 1, "memory")
    assert code not in (0, -signal.SIGKILL)
    assert not (tmp_path / "tiny/teacher_states/round=001/manifest.json").exists()
    assert attempt(tmp_path) == 0
    assert content(Run(small_config(tmp_path))) == content(finished)


def test_goes_on_on_another_machine(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store copied while a stage is half done: another root, another host, the same end."""
    assert attempt(tmp_path / "old", "teach", 2, "progress") == -signal.SIGKILL
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    run = Run(small_config(tmp_path / "new"))
    with run.records.lock("train"):
        assert content(carry_out(run.config)) == content(finished)


def test_the_clock_jumps_between_and_in_stages(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, cycle((86_400.0, -86_400.0, 3.2e8))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    run = carry_out(small_config(tmp_path))
    assert content(run) == content(finished)
    for table in ("trajectories", "teacher_states", "updates"):
        manifest = run.records.manifest(table, 1)
        assert manifest
        assert 0 < manifest.metrics["seconds"] < 600


def test_workers_of_the_verifier_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it judges: the answer it was at is judged again, and no verdict is lost or another."""
    monkeypatch.setattr("ogls.verifiers.pool._STALL_SECONDS", 10.0)
    verifier = Verifier(small_config(tmp_path).verify)
    cases = [Case(rf"\boxed{{{i}+{i}}}", "stop", str(2 * i)) for i in range(400)]
    kills = 0

    def kill(done: int, total: int) -> None:
        nonlocal kills
        if done in (100, 200):
            for child in psutil.Process().children():
                if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    kills += 1

    try:
        verdicts = [j.verdict for j in verifier.judge(cases, kill)]
    finally:
        verifier.close()
    assert kills >= 2
    assert verdicts == ["correct"] * 400


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_full_in_every_stage(finished: Run, small_disk: Path) -> None:
    """It grows a little each time the run stops, as somebody frees some space; nothing half-written stays."""
    config, stopped, size, said = small_config(small_disk), 0, 600, set()
    while True:
        try:
            run = carry_out(config)
            break
        except StoreError as error:
            said.add(str(error).partition(": ")[2])
            assert not list(small_disk.rglob("*.tmp"))
            stopped += 1
            size += 150
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
    assert stopped >= 5
    assert said == {"the disk is full: free some space, then run the same command again; what was finished is kept"}
    assert content(run) == content(finished)
    assert not list(small_disk.rglob("partial.json"))
