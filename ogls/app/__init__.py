"""The application: the command `ogls`, and the flows by the names that Prefect loads them by (`ogls.app:train_flow`).

In a source tree `flows/` and `tasks/` are folders of the project. A wheel has them inside this folder, so that their
names cannot collide with those of other packages; importing `ogls.app` makes them importable (ARCHITECTURE.md, "The
wheel"). This is the only module of `ogls` that imports them, and only when the command or a flow is asked for.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_FLOWS = {
    "train_flow": "flows.train",
    "continual_flow": "flows.continual",
    "evaluate_flow": "flows.evaluate",
    "evaluate_newest_flow": "flows.evaluate",
    "compare_file_flow": "flows.compare",
}

IN_WHEEL = (_FOLDER / "flows").is_dir()
# The project that is shipped: deployments/ and data/tiny. In a source tree it is the project itself.
PROJECT = _FOLDER / "project" if IN_WHEEL else _FOLDER.parents[1]

if IN_WHEEL and str(_FOLDER) not in sys.path:
    sys.path.insert(0, str(_FOLDER))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(_FOLDER), os.environ.get("PYTHONPATH")) if p)


def main() -> None:
    """Run the command `ogls`."""
    import_module("flows.cli").main()


def __getattr__(name: str) -> Any:
    """The flows."""
    if name in _FLOWS:
        return getattr(import_module(_FLOWS[name]), name)
    raise AttributeError(name)
