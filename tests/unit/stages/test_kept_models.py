"""A process that carries out stage after stage loads its model once, and gives the bits of one that loads it again."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import carry_out, content, small_config

from ogls.models.policy import Policy
from ogls.stages import run as run_module
from ogls.stages.kept_models import KeptModels, drop_models, process_models
from ogls.stages.run import Run


def test_a_kept_model_is_loaded_once_and_changes_no_bit(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    class Counted(Policy):
        def __init__(self, *arguments: object) -> None:
            loads.append(arguments)
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "Policy", Counted)
    run = carry_out(small_config(tmp_path), models=KeptModels())
    assert len(loads) == 1
    assert content(run) == content(finished)


def test_a_process_keeps_the_models_of_one_run(tmp_path: Path) -> None:
    first, second = small_config(tmp_path), small_config(tmp_path, "name=second")
    kept = process_models(first)
    assert process_models(first) is kept
    other = process_models(second)
    assert other is not kept
    drop_models()
    assert process_models(second) is not other
    drop_models()
