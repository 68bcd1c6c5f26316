"""`ogls compare`: a study continues after an interruption, and a killed study leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import REPO, SMALL, carry_out

from flows.services import adopts_orphans
from ogls.analysis.study import load_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


OGLS = [sys.executable, "-m", "flows.cli"]
METHODS = {"ogls-sd": "tiny.toml", "grpo": "tiny-grpo.toml"}


def write_study(tmp_path: Path, head: str, methods: dict[str, str], *overrides: str, seeds: int = 2) -> Path:
    """Write the TOML file of a study with two runs in parallel and separate folders. Returns its path."""
    study = tmp_path / "study.toml"
    settings = json.dumps([*SMALL, "rounds=1", *overrides, "evaluate.benchmarks=[{limit=8}]"])
    folders = (
        f'root = "{tmp_path}/runs"\nout = "{tmp_path}/out"\nseeds = {[*range(seeds)]}\nat_once = 2\nset = {settings}\n'
    )
    method_tables = "".join(
        f'[[methods]]\nname = "{name}"\nconfig = "{REPO}/deployments/runs/{file}"\n' for name, file in methods.items()
    )
    top, _, tables = head.partition("\n\n")
    study.write_text(f"{top}\n{folders}{tables}\n{method_tables}")
    return study


def own_prefect(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that starts a temporary Prefect server with a separate database."""
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    return environment


def compare(study: Path, tmp_path: Path) -> str:
    """Run the study; return the page."""
    command = [*OGLS, "compare", str(study)]
    environment = own_prefect(tmp_path)
    result = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=580
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def written(runs: Path) -> dict[str, str]:
    """The time at which each manifest was written, by path."""
    return {str(p.relative_to(runs)): json.loads(p.read_text())["written"] for p in runs.glob("*/*/*/manifest.json")}


def table(page: str) -> list[str]:
    """The first row of results of each method on the page, without the last column (seconds)."""
    return [line.rsplit("|", 2)[0] for line in page.splitlines() if line.startswith(("| ogls", "| grpo"))][:2]


def test_a_study_repeats_no_finished_run(tmp_path: Path) -> None:
    study = write_study(tmp_path, 'name = "s"', METHODS, seeds=1)
    carry_out(load_study(study).runs["ogls-sd", 0])
    before = written(tmp_path / "runs")
    page = compare(study, tmp_path)
    after = written(tmp_path / "runs")
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"s-grpo-s0"}
    assert len({row.split("|")[1] for row in table(page)}) == 2
    results = pq.read_table(tmp_path / "out/s/results.parquet").to_pylist()
    assert [(r["method"], r["seeds"]) for r in results] == [("ogls-sd", 1), ("grpo", 1)]
    gains = pq.read_table(tmp_path / "out/s/gains.parquet").to_pylist()
    assert [(r["method"], r["problems"]) for r in gains] == [(m, 8) for m in ("ogls-sd", "grpo") for _ in range(2)]
    assert [r["after"] for r in gains[::2]] == [r["accuracy"] for r in results]
    assert (tmp_path / "out/s/curves.png").stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.parametrize("tuned", [False, True])
def test_an_interrupted_study_is_finished_with_the_same_results(tmp_path: Path, tuned: bool) -> None:
    tune = "[tune]\nvalues = [1e-5, 5e-4]\nrounds = 1" if tuned else ""
    study = write_study(tmp_path, f'name = "s"\n\n{tune}', METHODS)
    first = compare(study, tmp_path)
    before = written(tmp_path / "runs")
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir())
    tuning = [f"s-tune{n}-{m}-s100" for n in (0, 1) for m in ("grpo", "ogls-sd")] if tuned else []
    assert runs == [*(f"s-{m}-s{s}" for m in ("grpo", "ogls-sd") for s in range(2)), *tuning]

    shutil.rmtree(tmp_path / "runs/s-grpo-s1")  # as if the study had been interrupted before this run
    second = compare(study, tmp_path)
    after = written(tmp_path / "runs")
    rewritten = {name for name in after if after[name] != before[name]}
    assert rewritten == {name for name in before if name.startswith("s-grpo-s1/")}

    assert table(first) == table(second)
    results = pq.read_table(tmp_path / "out/s/results.parquet").to_pylist()
    table_file = tmp_path / "out/s/tuning.parquet"
    tuning_rows = pq.read_table(table_file).to_pylist() if tuned else []
    assert sum(r["chosen"] for r in tuning_rows) == (2 if tuned else 0)
    for method, value in ((r["method"], r["value"]) for r in tuning_rows if r["chosen"]):
        config = json.loads((tmp_path / f"runs/s-{method}-s0/run.json").read_text())["config"]
        assert config["train"]["learning_rate"] == value
    assert [(r["method"], r["seeds"]) for r in results] == [("ogls-sd", 2), ("grpo", 2)]


@pytest.mark.nightly
def test_a_killed_study_leaves_no_process_behind(tmp_path: Path) -> None:
    """The worker processes exit by themselves; the next command stops the orphaned temporary server."""
    study = write_study(tmp_path, 'name = "k"\nreference = "grpo"', {"grpo": "tiny-grpo.toml"}, "rounds=50")
    environment = own_prefect(tmp_path)
    process = subprocess.Popen(
        [*OGLS, "compare", str(study)], cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "runs").glob("*/trajectories/round=001/manifest.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    servers = [p for p in family if "prefect.server.api.server:create_app" in p.cmdline()]
    assert len(servers) == 1
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([p for p in family if p not in servers], timeout=30)
    assert alive == []
    if (parent := servers[0].parent()) and not adopts_orphans(parent):
        servers[0].terminate()  # this parent may be the original one, so no command stops the server
        return
    small = [part for pair in (*SMALL, "rounds=0", f"root={tmp_path}/other") for part in ("--set", pair)]
    other = [*OGLS, "train", str(REPO / "deployments/runs/tiny-grpo.toml"), *small]
    subprocess.run(other, cwd=REPO, env=environment, check=True, capture_output=True, timeout=300)
    _, alive = psutil.wait_procs(servers, timeout=20)
    assert alive == []
