"""OGLS-SD: on-policy self-distillation with outcome-guided logit steering (arXiv 2605.12400).

The algorithm and its data; imports neither prefect nor mlflow. `ARCHITECTURE.md` has the map of the packages.
"""

from importlib.metadata import PackageNotFoundError, version


def _version() -> str:
    """The version of the installed package, or of the checkout if it is not installed, as on a bare GPU machine."""
    try:
        return version("ogls-sd")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]


__version__ = _version()
