"""The wheel's layout. A source tree and an editable install have flows/ and tasks/ in place and do not need this.

`flows` and `tasks` at the top level of site-packages would collide with the modules of other projects. So the wheel
has them in `ogls/app/`, beside the files of a new project, which `ogls init` copies (ARCHITECTURE.md, "The wheel").
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT = (
    *("deployments/prefect.yaml", "deployments/automations", "deployments/runs", "deployments/studies"),
    "data/tiny",
)


class BuildWheel(build_py):
    """Build the packages, then move flows/ and tasks/ into ogls/app/ and add the files of a project."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        app = Path(self.build_lib, "ogls/app")
        for name in ("flows", "tasks", "project"):
            shutil.rmtree(app / name, ignore_errors=True)  # of an earlier build
        for name in ("flows", "tasks"):
            shutil.move(Path(self.build_lib, name), app / name)
        for name in PROJECT:
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy
            (app / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            copy(name, app / "project" / name)


setup(cmdclass={"build_py": BuildWheel})
