"""Noticing a script that would start itself again in every worker process."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from ogls.errors import ConfigError


def require_main_guard(purpose: str = "verification") -> None:
    """Raise ConfigError if the main script has no `if __name__ == "__main__":`.

    A spawned worker process imports the main script. Without the guard, it would run the script again, and start
    workers of its own. `purpose` is what starts them, for the error.
    """
    path = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    if path.suffix != ".py" or not path.is_file():
        return  # an interactive session, a notebook or an executable
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    if not any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body):
        raise ConfigError(
            f"{path}: {purpose} starts worker processes, and each of them imports this script; put its code under "
            '`if __name__ == "__main__":`'
        )
