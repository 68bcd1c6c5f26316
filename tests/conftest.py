"""Fixtures and helpers of all tests: one thread, no network, the shipped tiny world, and one small finished run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ogls.config import AdapterConfig, ModelConfig, RunConfig, load_config
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.stages.kept_models import KeptModels
from ogls.stages.registry import STAGES
from ogls.stages.resume import is_trained, resume_round
from ogls.stages.run import Run
from ogls.tinyworld.seedmodel import PROMPTS
from ogls.training.batching import TrainItem

REPO = Path(__file__).parents[1]
TINY = REPO / "deployments" / "runs" / "tiny-world.toml"
ROUND = ("sample", "verify", "teach", "steer", "style", "train", "evaluate", "health")

# Two shards per stage, so that a stage can be half done; a run takes seconds.
SMALL = (
    "name=tiny",
    "rounds=2",
    "problems.per_round=8",
    "rollout.samples=4",
    "rollout.batch_size=16",
    "teacher.shard_groups=4",
    'teacher.pools=["reference"]',
    "train.batch_rollouts=8",
    "evaluate.samples=2",
    "evaluate.batch_size=16",
    "evaluate.bootstrap=100",
    "tracking.enabled=false",
    "tracking.report=off",
    "tracking.system_metrics=false",
)

UNGRADED: dict[str, Any] = {"reward": None, "feedback": None}  # columns of verdicts that few checkers fill

# Test files that share the services of a session fixture, by the name of the fixture.
_SHARED = {
    "services": ("test_deployments", "test_faults", "test_ui", "test_ray_jobs"),
    "trained": ("test_flow_runs", "test_tracking", "test_errors"),
}


def _group(file: str) -> str:
    """The group of a test file; all tests of a group run in one process. Files that share a fixture form one group."""
    return next((group for group, files in _SHARED.items() if Path(file).stem in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out nightly tests, and run groups with the most slow tests first: no process runs one at the end."""
    if not os.environ.get("OGLS_NIGHTLY"):
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    groups = {item: _group(str(item.path)) for item in items}
    slow = Counter(group for item, group in groups.items() if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[groups[item]])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` by group; `--dist loadgroup` sets an attribute that pytest 9.2 does not have."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(super()._split_scope(nodeid))

    return Groups(config, log)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the repository: shipped configurations have paths relative to it."""
    monkeypatch.chdir(REPO)


def small_config(root: Path | str, *overrides: str) -> RunConfig:
    """OGLS-SD with default settings on the tiny world, with few problems and rollouts."""
    config = load_config(TINY, [f"root={root}", *SMALL, *overrides])
    benchmarks = tuple(b.model_copy(update={"limit": 8}) for b in config.evaluate.benchmarks)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"benchmarks": benchmarks})})


def carry_out(
    config: RunConfig, rounds: int | None = None, models: KeptModels | None = None, ahead: bool = False
) -> Run:
    """Start or resume a run, as the train flow does, without Prefect, up to `rounds` (None: all rounds)."""
    run = Run(config, models)
    run.open()
    STAGES["prepare"](run, 0)
    for round_ in range(resume_round(run), (config.rounds if rounds is None else rounds) + 1):
        stages = ROUND[-2:] if is_trained(run, round_) else ROUND
        for name in stages:
            if config.has_teacher or name not in ("teach", "steer", "style"):
                STAGES[name](run, round_, **({"ahead": ahead} if name == "evaluate" else {}))
    return run


def again(run: Run) -> dict[str, tuple[bool, str]]:
    """Run every stage of a finished run again: (whether it was reused, its notice) by "stage round"."""
    results = {}
    for name, round_ in [("prepare", 0), ("evaluate", 0), *((n, r) for r in (1, 2) for n in ROUND)]:
        result = STAGES[name](Run(run.config), round_)
        results[f"{name} {round_}"] = (result.reused, result.notice)
    return results


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A small finished run of two rounds. Tests must not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        yield carry_out(small_config(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The shipped seed model with a LoRA adapter of small rank."""
    return Policy(ModelConfig(path=str(REPO / "data/tiny/model")), AdapterConfig(rank=4, alpha=8))


@pytest.fixture(scope="session")
def prompter(policy: Policy) -> Prompter:
    return Prompter(policy.tokenizer, PROMPTS)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for the tests only."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The services of `ogls up` for the tests only: a Prefect server, a worker and MLflow.

    A test that kills a service must start it again.
    """
    from services_fixture import ServiceStack

    with ServiceStack(tmp_path_factory.mktemp("services")) as stack:
        yield stack


@pytest.fixture
def console_output(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """The captured output of a console that shows the progress of stages."""
    from rich.console import Console

    from tasks.progress import show_progress_on

    show_progress_on(Console(width=300))
    yield capsys
    show_progress_on(None)


@pytest.fixture(scope="session")
def trained(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any, Any]:
    """A run trained for one round, then resumed to two: (configuration, first flow run, second flow run)."""
    from flow_helpers import newest_flow_run, tracked

    from flows.train import train_flow

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        root = tmp_path_factory.mktemp("flow")
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        overrides = ("name=flow-test", "tracking.report=tokens", "tracking.system_metrics=true")
        train_flow(tracked(root, *overrides, "rounds=1"))
        first = newest_flow_run("train flow-test")
        config = tracked(root, *overrides, "rounds=2")
        train_flow(config)
    return config, first, newest_flow_run("train flow-test")


def content(run: Run) -> dict[str, list[str]]:
    """Paths and checksums of all files that a run computed, by "table round"."""
    files = {}
    tables = (
        "problems",
        "trajectories",
        "verdicts",
        "teacher_states",
        "targets",
        "style",
        "updates",
        "scores",
        "health",
    )
    for table in tables:
        for round_ in run.records.rounds(table):
            manifest = run.records.manifest(table, round_)
            assert manifest
            files[f"{table} {round_}"] = [f"{f.path} {f.sha256}" for f in manifest.files]
    return files


def random_items(count: int = 12) -> list[TrainItem]:
    """Rollouts with random targets over 320 tokens; every third has no tail."""
    generator = torch.Generator().manual_seed(3)
    items = []
    for i in range(count):
        prompt = torch.randint(3, 320, (5 + i % 4,), generator=generator).tolist()
        tokens = torch.randint(3, 320, (4 + i % 7,), generator=generator).tolist()
        logits = torch.randn(len(tokens), 320, generator=generator).log_softmax(-1)
        top = logits.topk(8)
        tail = 1 - top.values.exp().sum(-1)
        items.append(
            TrainItem(("p", i), tuple(prompt), tuple(tokens), len(tokens), i % 3, top.indices, top.values, tail)
        )
    return items
