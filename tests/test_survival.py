"""SIGKILL inside every stage: the resumed run ends as one that was never killed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, ROUND, content, small_config

from ogls.run import Run

pytestmark = pytest.mark.slow


def attempt(root: Path, stage: str = "none", round_: int = 0, where: str = "progress") -> int:
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    return subprocess.run(
        [sys.executable, str(REPO / "tests" / "survivor.py"), str(root), stage, str(round_), where],
        env={**os.environ, "PYTHONPATH": path},
        cwd=REPO,
        check=False,
        capture_output=True,
    ).returncode


@pytest.mark.parametrize("where", ["progress", "commit"])
def test_killed_in_every_stage_and_resumed_to_the_same_end(finished: Run, tmp_path: Path, where: str) -> None:
    """One run, killed once in each stage of its rounds (prepare has no shards to be killed between)."""
    kills = [("evaluate", 0), *((name, 1 + i % 2) for i, name in enumerate(ROUND))]
    kills.sort(key=lambda kill: kill[1])
    if where == "commit":
        kills.insert(0, ("prepare", 0))
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
