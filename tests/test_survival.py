"""Faults such as SIGKILL in every stage: the resumed run has the same bits as a run without faults."""

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


@pytest.mark.parametrize("fault", ["progress", pytest.param("commit", marks=pytest.mark.nightly)])
def test_a_run_killed_in_every_stage_resumes_to_the_same_result(finished: Run, tmp_path: Path, fault: str) -> None:
    """commit: killed before the manifest of each stage. progress: killed during the work of the long stages."""
    kills = [("evaluate", 0), *((name, 1 + i % 2) for i, name in enumerate(ROUND))]
    kills.sort(key=lambda kill: kill[1])
    if fault == "commit":
        kills.insert(0, ("prepare", 0))
    else:
        kills = [kill for kill in kills if kill[0] in ("sample", "verify", "teach", "train")]
    for stage, round_ in kills:
        assert attempt(tmp_path, stage, round_, fault) == -signal.SIGKILL, f"{stage} r{round_} was not killed"
        table = {"sample": "trajectories", "teach": "teacher_states", "train": "updates"}.get(stage)
        if table:
            folder = tmp_path / "tiny" / table / f"round={round_:03d}"
            assert (folder / "partial.json").exists()
            assert not (folder / "manifest.json").exists()
    assert attempt(tmp_path) == 0
    run = Run(small_config(tmp_path))
    assert content(run) == content(finished)
    assert run.policy_hash(2) == finished.policy_hash(2)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("partial.json"))


def test_out_of_memory_in_the_teacher_pass(finished: Run, tmp_path: Path) -> None:
    """The address space is limited so that an allocation of the teacher pass fails."""
    exit_code = attempt(tmp_path, "teach", 1, "memory")
    assert exit_code not in (0, -signal.SIGKILL)
    assert not (tmp_path / "tiny/teacher_states/round=001/manifest.json").exists()
    assert attempt(tmp_path) == 0
    assert content(Run(small_config(tmp_path))) == content(finished)


def test_a_run_continues_on_another_machine(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is copied while a stage is half done; with another root and host name the result is the same."""
    assert attempt(tmp_path / "old", "teach", 2, "progress") == -signal.SIGKILL
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    run = Run(small_config(tmp_path / "new"))
    with run.records.lock("train"):
        assert content(carry_out(run.config)) == content(finished)


def test_jumps_of_the_clock_do_not_change_a_run(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_time, jumps = time.time, cycle((86_400.0, -86_400.0, 3.2e8))
    monkeypatch.setattr(time, "time", lambda: real_time() + next(jumps))
    run = carry_out(small_config(tmp_path))
    assert content(run) == content(finished)
    for table in ("trajectories", "teacher_states", "updates"):
        manifest = run.records.manifest(table, 1)
        assert manifest
        assert 0 < manifest.metrics["seconds"] < 600


def test_no_verdict_is_lost_when_verifier_workers_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose worker is killed is verified again; every verdict is as expected."""
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
        pytest.skip("no permission to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_in_every_stage(finished: Run, small_disk: Path) -> None:
    """The disk grows by 150 KiB each time the run stops, as if space were freed; no partly written file remains."""
    config, failures, size, messages = small_config(small_disk), 0, 600, set()
    while True:
        try:
            run = carry_out(config)
            break
        except StoreError as error:
            messages.add(str(error).partition(": ")[2])
            assert not list(small_disk.rglob("*.tmp"))
            failures += 1
            size += 150
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
    assert failures >= 5
    assert messages == {"the disk is full: free some space, then run the same command again; finished work is kept"}
    assert content(run) == content(finished)
    assert not list(small_disk.rglob("partial.json"))
