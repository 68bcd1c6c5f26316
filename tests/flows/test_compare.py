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
from conftest import REPO, SMALL

from flows.services import adopts_orphans

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


OGLS = [sys.executable, "-m", "flows.cli"]


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


@pytest.mark.parametrize(
    ("tuned", "seeds"), [(False, 1), *(pytest.param(t, 2, marks=pytest.mark.nightly) for t in (False, True))]
)
def test_a_study_is_finished_without_repeating_a_finished_run(tmp_path: Path, tuned: bool, seeds: int) -> None:
    tune = "[tune]\nvalues = [1e-5, 5e-4]\nrounds = 1" if tuned else ""
    study = write_study(
        tmp_path, f'name = "s"\n\n{tune}', {"ogls-sd": "tiny.toml", "grpo": "tiny-grpo.toml"}, seeds=seeds
    )
    environment = own_prefect(tmp_path)

    def compare() -> str:
        result = subprocess.run(
            [*OGLS, "compare", str(study)],
            cwd=REPO,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=580,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def written() -> dict[str, str]:
        """The time at which each manifest was written, by path."""
        manifests = (tmp_path / "runs").glob("*/*/round=*/manifest.json")
        return {str(p.relative_to(tmp_path)): json.loads(p.read_text())["written"] for p in manifests}

    first = compare()
    before = written()
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir())
    tuning = [f"s-tune{n}-{m}-s100" for n in (0, 1) for m in ("grpo", "ogls-sd")] if tuned else []
    assert runs == [*(f"s-{m}-s{s}" for m in ("grpo", "ogls-sd") for s in range(seeds)), *tuning]

    last = f"s-grpo-s{seeds - 1}"
    shutil.rmtree(tmp_path / "runs" / last)  # as if the study had been interrupted before this run
    second = compare()
    after = written()
    rewritten = {name for name in after if after[name] != before[name]}
    assert rewritten == {name for name in before if name.startswith(f"runs/{last}/")}

    def table(page: str) -> list[str]:
        """The first row of results of each method on the page, without the last column (seconds)."""
        rows = [line.rsplit("|", 2)[0] for line in page.splitlines() if line.startswith(("| ogls", "| grpo"))]
        return rows[:2]

    assert table(first) == table(second)
    assert len({row.split("|")[1] for row in table(first)}) == 2
    results = pq.read_table(tmp_path / "out/s/results.parquet").to_pylist()
    table_file = tmp_path / "out/s/tuning.parquet"
    tuning_rows = pq.read_table(table_file).to_pylist() if tuned else []
    assert sum(r["chosen"] for r in tuning_rows) == (2 if tuned else 0)
    for method, value in ((r["method"], r["value"]) for r in tuning_rows if r["chosen"]):
        config = json.loads((tmp_path / f"runs/s-{method}-s0/run.json").read_text())["config"]
        assert config["train"]["learning_rate"] == value
    assert [(r["method"], r["seeds"]) for r in results] == [("ogls-sd", seeds), ("grpo", seeds)]
    assert (tmp_path / "out/s/curves.png").stat().st_size > 10_000


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
