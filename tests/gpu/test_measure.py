"""The script of `make gpu` on the CPU: every part runs with the packages of a GPU machine, and writes its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REPO
from requirements import with_their_requirements

HAS = ("torch", "transformers", "peft", "pyarrow", "pydantic")  # what a GPU machine has, with what these require
PARTS = {"numerics", "teacher", "training", "steering", "sampling", "memory"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the installed packages HAS and those that they require, and to no others."""
    folder = tmp_path_factory.mktemp("packages")
    for name in with_their_requirements(HAS):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # required on another system only
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


def run_script(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """tests/gpu/measure.py where only `packages` are installed."""
    command = [sys.executable, "-S", "tests/gpu/measure.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)


@pytest.mark.nightly  # `make gpu` runs the script itself
def test_every_part_runs_on_the_cpu_and_writes_its_rows(packages: Path, tmp_path: Path) -> None:
    done = run_script(packages, str(tmp_path), "--device", "cpu", "--small")
    assert not {"prefect", "duckdb", "mlflow", "vllm", "obstore", "math_verify", "pytest"} & set(os.listdir(packages))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks = pq.read_table(tmp_path / "gpu-checks.parquet").to_pylist()
    speeds = pq.read_table(tmp_path / "gpu-speed.parquet").to_pylist()
    assert all(row["passed"] for row in checks)
    assert {row["part"] for row in checks if row["check"] == "ran to its end"} == PARTS
    compared = [row for row in checks if row["part"] == "numerics" and row["error"] is not None]
    assert len(compared) == 2 * 2 * 10  # two models, two data types
    assert any(row["error"] > 0 for row in compared)  # bfloat16 differs from the reference
    assert {row["part"] for row in speeds} == {"teacher pass", "training step", "steering", "sampling"}
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in speeds)
    assert all(row["device"].startswith("CPU") and row["mfu"] is None for row in speeds)
    table = (tmp_path / "gpu-speed.md").read_text().splitlines()
    assert len(table) == len(speeds) + 2


def test_without_a_gpu_nothing_is_measured(packages: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        refused = run_script(packages, "docs/measured")
        assert refused.returncode == 2
        assert "sees no CUDA device; nothing is measured" in refused.stderr
    refused = run_script(packages, "docs/measured", "--device", "cpu", "--small")
    assert refused.returncode == 2
    assert "docs/measured has measurements of GPUs only" in refused.stderr
