"""The shipped files: configurations and studies by name, and a new project."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from ogls.app import PROJECT
from ogls.errors import UserError

# The files of a new project; setup.py puts the same ones into the wheel.
_FILES = (
    *("deployments/prefect.yaml", "deployments/automations", "deployments/runs", "deployments/studies"),
    "data/tiny",
)
_IGNORED = "data/*\n!data/tiny/\n"
_README = """# {name}

    ogls train tiny                 # deployments/runs/tiny.toml: the tiny world, some minutes on a CPU
    ogls runs
    ogls up                         # Prefect at http://127.0.0.1:4200, MLflow at http://127.0.0.1:5000

`deployments/runs/` has configurations of runs, `deployments/studies/` of studies, `deployments/prefect.yaml` the
deployments of `ogls up`. Runs are written to `data/runs/`. Copy a configuration to start your own.
"""


def find_file(name: str | Path, kind: str) -> Path:
    """The TOML file that an argument names: a path, or the name of a file in deployments/KIND/, here or shipped.

    `kind` is runs or studies. A path is returned as it is.
    """
    if Path(name).suffix == ".toml" or len(Path(name).parts) != 1:
        return Path(name)
    files = [folder / "deployments" / kind / f"{name}.toml" for folder in (Path(), PROJECT)]
    if found := next((f for f in files if f.is_file()), None):
        return found
    known = sorted({f.stem for folder in (Path(), PROJECT) for f in (folder / "deployments" / kind).glob("*.toml")})
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{kind}: {', '.join(known)}"
    raise UserError(f"no file {name or repr('')}, and no shipped configuration of that name; {hint}")


def create_project(folder: Path) -> list[Path]:
    """Copy the shipped project into a folder, which is created. Returns what was written, relative to the folder.

    A README.md or .gitignore that exists is kept. Raises UserError, and writes nothing, if another of the files exists.
    """
    texts = {"README.md": _README.format(name=folder.resolve().name), ".gitignore": _IGNORED}
    texts = {name: text for name, text in texts.items() if not (folder / name).exists()}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder: ogls init NAME")
    if existing := [name for name in _FILES if (folder / name).exists()]:
        raise UserError(f"{folder} has {', '.join(existing)} already; choose another folder: ogls init NAME")
    for name in _FILES:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(PROJECT / name, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [Path(name) for name in (*_FILES, *texts)]
