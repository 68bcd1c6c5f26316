"""Functions that users bring, named `module:function`: a checker of answers, a loss."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ogls.digests import path_digest


def add_working_directory() -> None:
    """Let the working directory be searched for modules of users."""
    import sys

    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_function(name: str) -> Any:
    """Import the function `module:function`, also from the working directory.

    Raises whatever importing the module raises, and AttributeError if the module has no such function.
    """
    from importlib import import_module

    add_working_directory()
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def function_content(name: str) -> str:
    """The name of a function with a digest of its module's file; empty without a name, or if the file is not found."""
    if not name:
        return ""
    add_working_directory()
    try:
        spec = find_spec(name.partition(":")[0])
    except ImportError:
        return ""
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return ""
    return f"{name}@{path_digest(Path(spec.origin))[:32]}"
