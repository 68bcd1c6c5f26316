"""Build the wheel, install it in a fresh environment without the tools of developers, and use it in an empty folder.

    python tests/installed.py [FOLDER]

`make installed` runs this. FOLDER (default: a temporary one) gets the wheel, the environment and the project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command, without this project on the path, and return its output; print the output if it fails."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PREFECT_HOME", "PREFECT_API_URL")}
    print("$", *(Path(c).name if isinstance(c, Path) else c for c in command), flush=True)
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**variables, **environment}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"exit code {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", REPO, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        install(folder, wheel)
        use(folder, folder / "venv/bin")


def install(folder: Path, wheel: Path) -> None:
    """Install the wheel, and check that it adds no module but `ogls`."""
    started = time.monotonic()
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = (folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-qq", "--constraint", REPO / "constraints.txt", wheel, cwd=folder)
    seconds = time.monotonic() - started
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    size = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file())
    print(f"installed in {seconds:.0f} s: {size / 2**30:.2f} GiB, the wheel has {wheel.stat().st_size / 2**20:.1f} MiB")
    (record,) = packages.glob("ogls_sd-*.dist-info/RECORD")
    names = {line.split("/")[0] for line in record.read_text().splitlines() if not line.startswith("..")}
    assert names == {"ogls", record.parent.name}, names
    assert not list(packages.glob("pytest*")), "tools of developers are installed"


def use(folder: Path, bin_: Path) -> None:
    """Start as a new user does: train a shipped configuration in an empty folder, then in a project of `ogls init`."""
    ogls, quick = bin_ / "ogls", ("--set", "rounds=1", "--set", "problems.per_round=8", "--set", "evaluate.samples=1")
    empty = folder / "empty"
    empty.mkdir()
    assert "ogls-sd" in run(ogls, "--version", cwd=empty)
    assert "run tiny" in run(ogls, "train", "tiny", *quick, cwd=empty)
    rows = json.loads(run(ogls, "query", "--name", "rounds", "--run", "tiny", "--format", "json", cwd=empty))
    assert [row["round"] for row in rows] == [0, 1], rows
    run(ogls, "init", "mine", cwd=empty)
    project = empty / "mine"
    assert (project / "deployments/prefect.yaml").is_file()
    assert (project / "deployments/studies/family.toml").is_file()
    run(ogls, "train", "tiny", *quick, cwd=project)
    run(ogls, "report", "tiny", cwd=project)
    run(ogls, "doctor", cwd=project)
    # The flows can be loaded by their names, as a worker of Prefect does, beside another module named `flows`.
    (project / "flows.py").write_text("raise ImportError('another project')\n")
    load = "from prefect.flows import load_flow_from_entrypoint as load; print(load('ogls.app:train_flow').name)"
    assert run(bin_ / "python", "-c", load, cwd=project) == "train\n"


if __name__ == "__main__":
    main()
