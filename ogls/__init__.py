"""OGLS-SD: on-policy self-distillation with outcome-guided logit steering (arXiv 2605.12400).

The algorithm and its data; imports neither prefect nor mlflow. `ARCHITECTURE.md` has the map of the packages.
"""

from importlib.metadata import version

__version__ = version("ogls-sd")
