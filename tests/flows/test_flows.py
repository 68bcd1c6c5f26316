"""Flows under a real Prefect server: states, names, artifacts, retries, tracking."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import rich.console
from flowing import tracked

from flows.evaluate import evaluate_flow
from flows.train import train_flow
from ogls.config import RunConfig
from ogls.errors import Collapse, DataError, RunLocked, StoreError
from ogls.htmlreport import read_report, write_report
from ogls.revision import code
from ogls.run import Run
from tasks.live import UNITS
from tasks.progress import watch
from tasks.stages import _place

pytestmark = pytest.mark.usefixtures("prefect_server")
ROUND = ("sample", "verify", "teach", "steer", "style", "train", "evaluate", "health", "publish")


def from_server(method: str, **arguments: Any) -> list[Any]:
    async def ask() -> list[Any]:
        from prefect import get_client

        async with get_client() as client:
            return await getattr(client, method)(**arguments)

    return asyncio.run(ask())


def task_runs(flow_run: Any) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    return from_server("read_task_runs", flow_run_filter=chosen, limit=200)


def newest_flow_run(name: str) -> Any:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    chosen = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
    return from_server("read_flow_runs", flow_run_filter=chosen, sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def metrics_of(config: RunConfig, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture(scope="module")
def trained(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any, Any]:
    """A run trained for one round, then resumed to two: its configuration and both flow runs."""
    from conftest import REPO

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        root = tmp_path_factory.mktemp("flow")
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        watched = ("name=flow-test", "tracking.report=tokens", "tracking.system_metrics=true")
        train_flow(tracked(root, *watched, "rounds=1"))
        first = newest_flow_run("train flow-test")
        config = tracked(root, *watched, "rounds=2")
        train_flow(config)
    return config, first, newest_flow_run("train flow-test")


def test_a_run_is_readable_in_the_ui(trained: tuple) -> None:
    _, first, second = trained
    assert first.id != second.id
    assert {first.state_name, second.state_name} == {"Completed"}
    names = Counter(run.name for run in task_runs(second))
    wanted = [
        "prepare r000",
        "evaluate r000",
        "health r000",
        "publish r000",
        "report",
        *(f"{n} r{r:03d}" for r in (1, 2) for n in ROUND),
    ]
    assert names == Counter(wanted)


def test_finished_stages_show_as_already_done(trained: tuple) -> None:
    _, first, second = trained
    assert {r.state_name for r in task_runs(first)} == {"Completed"}
    states = {r.name: r.state_name for r in task_runs(second) if not r.name.startswith("publish")}
    done = {name for name, state in states.items() if state == "Already done"}
    assert done == {n for n in states if n.endswith(("r000", "r001"))}
    assert {state for name, state in states.items() if name not in done} == {"Completed"}


def test_the_table_of_rounds_is_an_artifact(trained: tuple) -> None:
    config, _, second = trained
    found = [a for a in from_server("read_artifacts") if a.type == "markdown"]
    artifacts = {a.key: a for a in found if a.flow_run_id == second.id}
    assert sorted(artifacts) == ["flow-test-r000", "flow-test-r001", "flow-test-r002"]
    shown = artifacts["flow-test-r002"].data
    summary = Run(config).records.read("summaries", 2).to_pylist()[0]
    assert f"| 2 | {summary['accuracy']:.3f} |" in shown
    assert shown.count("sample ") >= 3
    assert "\\boxed" in shown
    assert "![accuracy and length by round](data:image/png;base64,iVBOR" in shown
    assert len(shown) < 80_000  # the picture too: there is one a round


def test_live_progress_has_count_rate_and_an_end(trained: tuple) -> None:
    """An artifact a stage, its versions the rounds; what is said while it goes on is tested in test_live."""
    from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

    keys = [f"flow-test-{stage}" for stage in UNITS]
    chosen = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=keys))
    found = {a.key: a for a in from_server("read_latest_artifacts", artifact_filter=chosen)}
    assert sorted(found) == sorted(keys)
    for key, artifact in found.items():
        assert (artifact.type, artifact.data) == ("progress", 100.0)
        assert re.search(rf"r002 {key.removeprefix('flow-test-')}: done, \d+ rows in", artifact.description)


def test_flow_runs_are_tagged_by_method_and_model(trained: tuple) -> None:
    _, first, second = trained
    assert set(first.tags) == set(second.tags) == {"method: ogls-sd", "model: tiny/model"}


def test_a_dead_flow_run_is_shown_as_crashed_by_whoever_goes_on(tmp_path: Path) -> None:
    """As a killed process leaves it: Running for ever, until another one holds the run."""
    from prefect.states import Running

    config = tracked(tmp_path, "name=dead", "rounds=0")
    other = tracked(tmp_path / "other", "name=dead", "rounds=0")
    for same in (config, other):
        from_server(
            "create_flow_run",
            flow=train_flow,
            parameters={"config": same.model_dump(mode="json")},
            name="train dead",
            state=Running(),
        )
    train_flow(config)
    runs = from_server("read_flow_runs")
    states = {(r.parameters["config"]["root"], r.state_name) for r in runs if r.name == "train dead"}
    assert states == {(config.root, "Crashed"), (config.root, "Completed"), (other.root, "Running")}


def test_a_flow_run_that_was_refused_meanwhile_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen as running by the one that holds the run, it fails before it could be shown as crashed."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.states import Failed, Running

    config = tracked(tmp_path, "name=refused", "rounds=0")
    parameters, name = {"config": config.model_dump(mode="json")}, "train refused"
    other = from_server("create_flow_run", flow=train_flow, parameters=parameters, name=name, state=Running())
    read, refused = SyncPrefectClient.read_flow_runs, []

    def read_and_refuse(client: SyncPrefectClient, **arguments: Any) -> Any:
        found = read(client, **arguments)
        if any(run.id == other.id for run in found):
            refused.append(client.set_flow_run_state(other.id, Failed(message="run refused is held")))
        return found

    monkeypatch.setattr(SyncPrefectClient, "read_flow_runs", read_and_refuse)
    train_flow(config)
    monkeypatch.undo()
    assert len(refused) == 1
    (run,) = [r for r in from_server("read_flow_runs") if r.id == other.id]
    assert (run.state_name, run.state.message) == ("Failed", "run refused is held")


def test_another_version_of_the_code_is_said_or_refused(
    tmp_path: Path, watched: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tracked(tmp_path, "name=older", "rounds=0")
    train_flow(config)
    monkeypatch.setattr("ogls.runstore.code", lambda: {"version": "99.0", "revision": None})
    refusing = tracked(tmp_path, "name=older", "rounds=0", "execution.other_version=refuse")
    with pytest.raises(StoreError, match=r"last carried out by ogls-sd 0\.2\.0, and this is 99\.0; install that one"):
        train_flow(refusing)
    train_flow(config)
    assert "this is 99.0: finished stages stay as they are" in watched.readouterr().out
    watched.readouterr()
    train_flow(refusing)  # it is that version's run now
    assert "last carried out" not in watched.readouterr().out


def test_one_mlflow_run_with_every_round_once(trained: tuple) -> None:
    config, _, _ = trained
    assert [step for step, _ in metrics_of(config, "evaluate/accuracy")] == [0, 1, 2]
    records = Run(config).records
    wanted = [records.read("summaries", r).to_pylist()[0]["accuracy"] for r in (0, 1, 2)]
    assert [value for _, value in metrics_of(config, "evaluate/accuracy")] == pytest.approx(wanted)
    assert [step for step, _ in metrics_of(config, "train/loss")] == [1, 2]


def test_mlflow_has_parameters_configuration_and_adapters(trained: tuple) -> None:
    from mlflow.tracking import MlflowClient

    config, _, _ = trained
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "flow-test"
    assert run.data.params["train.learning_rate"] == str(config.train.learning_rate)
    files = {a.path for a in client.list_artifacts(run.info.run_id, "adapters/round=002")}
    assert {p.rsplit("/", 1)[1] for p in files} == {"adapter_config.json", "adapter_model.safetensors"}
    local = client.download_artifacts(run.info.run_id, "adapters/round=002/adapter_model.safetensors")
    assert Path(local).read_bytes() == Run(config).attachment(2, "adapter_model.safetensors")
    assert 'name = "flow-test"' in Path(client.download_artifacts(run.info.run_id, "config.toml")).read_text()


def only_run(config: RunConfig) -> tuple[Any, Any]:
    """A client, and the one MLflow run of a configuration."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    return client, run


def test_mlflow_has_the_data_and_what_ran_it(trained: tuple) -> None:
    config, _, _ = trained
    _, run = only_run(config)
    inputs = {i.dataset.name: i for i in run.inputs.dataset_inputs}
    assert set(inputs) == {"train-train", "test-tiny"}
    for split, name, context in (("train", "train-train", "training"), ("tiny", "test-tiny", "evaluation")):
        assert inputs[name].dataset.digest == Run(config).split_digest(split)
        assert json.loads(inputs[name].dataset.profile) == {"num_rows": len(Run(config).problems(split))}
        assert [t.value for t in inputs[name].tags] == [context]
    tags = run.data.tags
    assert (tags["ogls.method"], tags["ogls.model"], tags["ogls.run"]) == ("ogls-sd", "data/tiny/model", "flow-test")
    assert tags.get("mlflow.source.git.commit") == code()["revision"]
    groups = {name.split("/")[0] for name in run.data.metrics if "/" in name}
    assert groups == {"evaluate", "train", "steer", "style", "seconds", "tokens", "system"}
    assert metrics_of(config, "tokens/sample")[0][1] > 0
    assert metrics_of(config, "system/cpu_utilization_percentage")


def test_adapters_are_versions_of_a_model_that_plain_peft_loads(
    trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, _, _ = trained
    client, _ = only_run(config)
    versions = client.search_model_versions("name='ogls-sd-flow-test'")
    assert sorted(int(v.tags["ogls.round"]) for v in versions) == [1, 2]  # each once, although the run was resumed
    best = Run(config).records.manifest("health", 2).metrics["best"]
    assert client.get_model_version_by_alias("ogls-sd-flow-test", "best").tags["ogls.round"] == str(best)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking.uri)
    mlflow.set_tracking_uri(config.tracking.uri)
    ids = torch.tensor([[5, 6, 7, 8]])
    for address, round_ in (("models:/ogls-sd-flow-test@best", best), ("models:/ogls-sd-flow-test/latest", 2)):
        folder = mlflow.artifacts.download_artifacts(address)
        base = AutoModelForCausalLM.from_pretrained(config.model.path)
        loaded = PeftModel.from_pretrained(base, folder)
        policy = Run(config).policy(round_)
        with torch.inference_mode():
            wanted = policy.logits(policy.hidden(ids).last_hidden_state)
            assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=1e-5)


def test_the_report_is_in_mlflow_and_linked_from_the_last_round(trained: tuple) -> None:
    config, _, _ = trained
    client, run = only_run(config)
    page = Path(client.download_artifacts(run.info.run_id, "report/report.html")).read_text()
    assert page == read_report(Run(config))
    assert "OGLS-SD: flow-test" in page
    artifacts = {a.key: a.data for a in from_server("read_artifacts") if a.key and a.key.startswith("flow-test-r0")}
    assert "The report of the whole run" in artifacts["flow-test-r002"]
    assert "The report" not in artifacts["flow-test-r000"]
    before = Path(Run(config).records.url("report.html")).stat().st_mtime_ns
    write_report(Run(config))  # nothing has come since: it stays
    assert Path(Run(config).records.url("report.html")).stat().st_mtime_ns == before


def test_a_report_that_fails_leaves_the_training_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise OSError("no room")

    monkeypatch.setattr("ogls.htmlreport.write_report", broken)
    watched = rich.console.Console(file=io.StringIO(), width=200)
    watch(watched)
    train_flow(tracked(tmp_path, "name=unreported", "rounds=1", "tracking.enabled=false", "tracking.report=plain"))
    watch(None)
    assert "no report (OSError: no room); `ogls report unreported` makes it" in watched.file.getvalue()
    assert newest_flow_run("train unreported").state_name == "Completed"


def test_style_and_health_are_numbers_and_tags(trained: tuple) -> None:
    from mlflow.tracking import MlflowClient

    config, _, _ = trained
    numbers = Run(config).records.manifest("style", 2).metrics["numbers"]
    for name in ("target_style_share", "direction_style_share", "reference_kl", "correct_kl_at_substance"):
        assert [step for step, _ in metrics_of(config, f"style/{name}")] == [1, 2]
        assert metrics_of(config, f"style/{name}")[1][1] == pytest.approx(numbers[name])
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    health = Run(config).records.manifest("health", 2).metrics
    assert run.data.tags["ogls.health"] == health["state"]
    assert run.data.tags["ogls.best_round"] == str(health["best"])


def test_a_collapse_is_told_in_the_ui_and_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    events: list[dict[str, Any]] = []
    monkeypatch.setattr("tasks.events.emit_event", lambda **event: events.append(event))

    opsd = ("steer.recipe=opsd", "train.rollouts=all", "train.divergence=forward_kl", "train.learning_rate=5e-3")
    config = tracked(tmp_path, "name=collapse", "rounds=3", "health.short=stop", *opsd)
    with pytest.raises(Collapse, match="the median length fell"):
        train_flow(config)
    flow = newest_flow_run("train collapse")
    assert flow.state_name == "Failed"
    assert "the median length fell" in flow.state.message
    assert {r.name for r in task_runs(flow) if r.name.endswith("r002")} == set()  # it ended with round 1
    (artifact,) = [a for a in from_server("read_artifacts") if a.key == "collapse-r001"]
    assert "the run is stopped. Best so far: round 0, the base model" in artifact.data
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags["ogls.health"] == "stop"
    assert "the median length fell" in run.data.tags["ogls.health.why"]
    named = [(e["event"], e["payload"].get("round")) for e in events]
    assert named == [
        *(("ogls.round.finished", 0), ("ogls.round.best", 0)),
        *(("ogls.round.finished", 1), ("ogls.run.collapsed", 1)),
    ]
    assert events[-1]["resource"]["prefect.resource.id"] == "ogls.run.collapse"
    assert "the median length fell" in events[-1]["payload"]["notice"]
    Path(Run(config).records.url("scores/round=001/part-0000.parquet")).unlink()
    with pytest.raises(Collapse):  # the decision is on record: it stands when the run is started again
        train_flow(config)
    (redone,) = [e["payload"] for e in events if e["event"] == "ogls.stage.redone"]
    assert (redone["stage"], redone["round"]) == ("evaluate", 1)
    assert "part-0000.parquet is missing" in redone["why"]


def test_a_method_without_a_teacher_runs_no_teacher_stage(tmp_path: Path) -> None:
    train_flow(tracked(tmp_path, "name=no-teacher", "rounds=1", "train.objective=grpo", "tracking.enabled=false"))
    names = {r.name for r in task_runs(newest_flow_run("train no-teacher"))}
    assert {n for n in names if n.endswith("r001")} == {
        *("sample r001", "verify r001", "train r001", "evaluate r001", "health r001", "publish r001")
    }


def test_evaluation_on_its_own(trained: tuple) -> None:
    config, _, _ = trained
    assert evaluate_flow(config) == [2]
    assert evaluate_flow(config, [0, 1]) == [0, 1]


@pytest.fixture
def watched(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What somebody in the foreground is told."""
    from rich.console import Console

    from tasks.progress import watch

    watch(Console(width=300))
    yield capsys
    watch(None)


def failing(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[int]:
    """Make the sampler raise these errors in turn in evaluation (the probe of one request passes); counts its calls."""
    from ogls.engines.transformers import TransformersSampler

    real, calls = TransformersSampler.sample, [0]

    def sample(self: Any, requests: Any, sampling: Any) -> Any:
        if len(requests) > 1:
            calls[0] += 1
            if errors:
                raise errors.pop(0)
        return real(self, requests, sampling)

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    return calls


def test_an_error_that_may_heal_is_retried_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, [ConnectionError("gone"), RuntimeError("CUDA out of memory")])
    config = tracked(tmp_path, "name=heals", "rounds=0", "tracking.enabled=false")
    train_flow(config)
    said = watched.readouterr().out
    assert "evaluate r000: ConnectionError: gone; it is tried again" in said
    assert "evaluate r000: RuntimeError: CUDA out of memory; it is tried again" in said
    runs = {r.name: r for r in task_runs(newest_flow_run("train heals"))}
    assert runs["evaluate r000"].run_count == 3
    assert Run(config).records.manifest("scores", 0)


def test_one_stage_at_a_time_holds_a_place_of_the_limit() -> None:
    """Two runs on one machine: the second waits for the first's stage, not for the first."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("one-device", 1)
    inside: list[int] = []

    def hold(number: int) -> None:
        with _place("one-device"):
            inside.append(number)
            assert len(inside) == 1
            time.sleep(1)
            inside.remove(number)

    with ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        for future in [pool.submit(hold, n) for n in range(2)]:
            future.result(timeout=60)
    assert time.monotonic() - started >= 2


def test_an_error_of_the_users_making_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, [DataError("bad rows")] * 5)
    with pytest.raises(DataError, match="bad rows"):
        train_flow(tracked(tmp_path, "name=cannot-heal", "rounds=0"))
    assert calls == [1]
    flow_run = newest_flow_run("train cannot-heal")
    assert flow_run.state_name == "Failed"
    assert {r.name: r.run_count for r in task_runs(flow_run)}["evaluate r000"] == 1


def test_a_stage_past_its_limit_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from ogls.engines.transformers import TransformersSampler

    monkeypatch.setattr(TransformersSampler, "sample", lambda *_: [time.sleep(0.1) for _ in range(600)])
    config = tracked(tmp_path, "name=slow", "rounds=0", "execution.timeout_seconds=8", "execution.retries=0")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        train_flow(config)
    assert time.monotonic() - started < 50
    assert Run(config).records.manifest("scores", 0) is None


def test_training_goes_on_with_one_warning_when_mlflow_is_away(
    tmp_path: Path, watched: pytest.CaptureFixture[str]
) -> None:
    config = tracked(tmp_path, "name=away", "rounds=1", "tracking.uri=postgresql://user:secret@127.0.0.1:9/db")
    train_flow(config)
    said = watched.readouterr().out
    assert said.count("is away") == 1
    assert "MLflow at postgresql://127.0.0.1:9/db is away" in said
    assert "secret" not in said
    assert newest_flow_run("train away").state_name == "Completed"
    assert Run(config).records.manifest("scores", 1)


def test_rounds_missed_while_mlflow_was_away_are_logged_later(tmp_path: Path) -> None:
    train_flow(tracked(tmp_path, "name=later", "rounds=1", "tracking.uri=http://127.0.0.1:9"))
    config = tracked(tmp_path, "name=later", "rounds=1")
    train_flow(config)
    assert [step for step, _ in metrics_of(config, "evaluate/accuracy")] == [0, 1]


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    config = tracked(tmp_path, "name=held", "rounds=0")
    with Run(config).records.lock("train"), pytest.raises(RunLocked, match=r"run held is held by process \d+ on"):
        train_flow(config)


def test_a_name_with_another_configuration_is_refused(trained: tuple) -> None:
    config, _, _ = trained
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(StoreError, match="seed: 0 -> 5"):
        train_flow(other)


def test_the_parameter_form_is_the_configuration() -> None:
    """The UI shows and checks what the flow declares: sections with described fields and defaults."""
    schema = train_flow.parameters.model_dump()
    sections = schema["definitions"]["RunConfig"]["properties"]
    assert {"model", "rollout", "teacher", "steer", "train", "evaluate"} <= set(sections)
    rate = schema["definitions"]["TrainConfig"]["properties"]["learning_rate"]
    assert rate["default"] == 1e-4
    assert "AdamW" in rate["description"]
