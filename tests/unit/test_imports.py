"""The direction of imports (DESIGN section 3), as import-linter's contracts in pyproject.toml have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import REPO


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ogls_imports_where_prefect_mlflow_duckdb_and_vllm_are_missing() -> None:
    """A GPU machine may have torch, transformers, peft and pyarrow alone; every stage must load there."""
    code = (
        "import sys\n"
        "for name in ('prefect', 'mlflow', 'duckdb', 'vllm', 'typer', 'rich'): sys.modules[name] = None\n"
        "import ogls.stages, ogls.report, ogls.teacher, ogls.train, ogls.engines.transformers, ogls.query"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
