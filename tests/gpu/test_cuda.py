"""Results on a GPU equal those on the CPU; skipped without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import carry_out, small_config

from ogls.config import AdapterConfig, ModelConfig
from ogls.models.continuation import run_continuations
from ogls.models.policy import Policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    from conftest import REPO

    path = str(REPO / "data/tiny/model")
    return {d: Policy(ModelConfig(path=path, device=d), AdapterConfig(rank=4)) for d in ("cpu", "cuda")}


def test_teacher_states_agree(policies: dict[str, Policy]) -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (5, 40, 12)]
    pairs = [(i, torch.randint(3, 320, (20,), generator=generator).tolist()) for i in (0, 1, 1, 2)]
    with torch.no_grad():
        states = {d: list(run_continuations(p, prefixes, pairs, 4096)) for d, p in policies.items()}
    for cpu, cuda in zip(states["cpu"], states["cuda"], strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-3, rtol=1e-3)


def test_a_whole_round_on_the_gpu(tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path, "model.device=cuda"), rounds=1)
    assert run.policy_hash(1) != "base"
    assert run.records.read("updates", 1).num_rows > 0


def test_bfloat16_on_the_gpu(tmp_path: Path) -> None:
    config = small_config(tmp_path, "model.device=cuda", "model.dtype=bfloat16", "teacher.state_dtype=bfloat16")
    run = carry_out(config, rounds=1)
    assert all(r["loss"] > 0 for r in run.records.read("updates", 1).to_pylist())
