"""Build the wheel, install it in an environment of its own, and use it as a new user does.

    python tests/installed.py [FOLDER] [--fresh]

`make installed` runs this, and `make nightly` with `--fresh`. FOLDER (default: a temporary one) gets the wheel, the
environment and the project. The environment sees the packages of this Python, but not this project; with `--fresh` it
has what the wheel declares and nothing else, without the tools of developers, as users have it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty; choose another folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", REPO, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        install(folder, wheel, given.fresh)
        use(folder, folder / "venv/bin", given.fresh)


def install(folder: Path, wheel: Path, fresh: bool) -> None:
    """Install the wheel, and check that it adds no module but `ogls`."""
    started = time.monotonic()
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = (folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    if fresh:
        run(*pip, "install", "-qq", "--constraint", REPO / "constraints.txt", wheel, cwd=folder)
        assert not list(packages.glob("pytest*")), "tools of developers are installed"
    else:  # .pth files of the other folder, such as that of this project, have no effect
        (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
        run(*pip, "install", "-qq", "--no-deps", wheel, cwd=folder)
    print(f"installed in {time.monotonic() - started:.0f} s; the wheel has {wheel.stat().st_size / 2**20:.1f} MiB")
    if fresh:
        size = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file())
        print(f"with all that it declares: {size / 2**30:.2f} GiB")
    (record,) = packages.glob("ogls_sd-*.dist-info/RECORD")
    names = {line.split("/")[0] for line in record.read_text().splitlines() if not line.startswith("..")}
    assert names == {"ogls", record.parent.name}, names


def use(folder: Path, bin_: Path, fresh: bool) -> None:
    """Start as a new user does: train a shipped configuration in a project of `ogls init`; if fresh, in an empty folder
    too."""
    ogls, quick = bin_ / "ogls", ("--set", "rounds=1", "--set", "problems.per_round=8", "--set", "evaluate.samples=1")
    empty = folder / "empty"
    empty.mkdir()
    assert "ogls-sd" in run(ogls, "--version", cwd=empty)
    if fresh:
        assert "run tiny" in run(ogls, "train", "tiny", *quick, cwd=empty)
        run(ogls, "doctor", cwd=empty)
    run(ogls, "init", "mine", cwd=empty)
    project = empty / "mine"
    assert (project / "deployments/prefect.yaml").is_file()
    assert (project / "deployments/studies/family.toml").is_file()
    assert "run tiny" in run(ogls, "train", "tiny", *quick, cwd=project)
    rows = json.loads(run(ogls, "query", "--name", "rounds", "--run", "tiny", "--format", "json", cwd=project))
    assert [row["round"] for row in rows] == [0, 1], rows
    run(ogls, "report", "tiny", cwd=project)
    # The flows can be loaded by their names, as a worker of Prefect does, beside another module named `flows`.
    (project / "flows.py").write_text("raise ImportError('another project')\n")
    load = "from prefect.flows import load_flow_from_entrypoint as load; print(load('ogls.app:train_flow').name)"
    assert run(bin_ / "python", "-c", load, cwd=project) == "train\n"


if __name__ == "__main__":
    main()
