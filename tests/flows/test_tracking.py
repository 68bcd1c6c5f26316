"""MLflow tracking: what is logged for a run, and that training continues while the server is unavailable."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rich.console
from conftest import carry_out
from flow_helpers import from_server, metrics_of, newest_flow_run, only_run, task_runs, tracked
from history import counted, make_history
from prefect.artifacts import create_markdown_artifact

from flows.evaluate import evaluate_flow
from flows.train import train_flow
from ogls.analysis.report import read_report, write_report
from ogls.errors import HealthStop
from ogls.revision import code_version
from ogls.stages.run import Run
from tasks import events as task_events
from tasks import publish as publishing
from tasks.model_registry import adapter_source, log_adapter
from tasks.progress import show_progress_on
from tasks.tracking import track

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_one_mlflow_run_has_every_round_once(trained: tuple) -> None:
    config, _, _ = trained
    assert [step for step, _ in metrics_of(config, "evaluate/accuracy")] == [0, 1, 2]
    records = Run(config).records
    expected = [records.read("summaries", r).to_pylist()[0]["accuracy"] for r in (0, 1, 2)]
    assert [value for _, value in metrics_of(config, "evaluate/accuracy")] == pytest.approx(expected)
    assert [step for step, _ in metrics_of(config, "train/loss")] == [1, 2]
    agreement = [Run(config).records.manifest("updates", r).metrics["loss_metrics"]["agreement"] for r in (1, 2)]
    assert metrics_of(config, "train/agreement") == [(1, agreement[0]), (2, agreement[1])]


def test_mlflow_has_parameters_and_the_configuration(trained: tuple) -> None:
    from mlflow.tracking import MlflowClient

    config, _, _ = trained
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "flow-test"
    assert run.data.params["train.learning_rate"] == str(config.train.learning_rate)
    assert not client.list_artifacts(run.info.run_id, "adapters")  # model versions refer to the store
    assert 'name = "flow-test"' in Path(client.download_artifacts(run.info.run_id, "config.toml")).read_text()


def test_mlflow_has_datasets_tags_and_metric_groups(trained: tuple) -> None:
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
    assert tags.get("mlflow.source.git.commit") == code_version()["revision"]
    groups = {name.split("/")[0] for name in run.data.metrics if "/" in name}
    assert groups == {"evaluate", "train", "steer", "style", "seconds", "tokens", "system"}
    assert metrics_of(config, "tokens/sample")[0][1] > 0
    assert metrics_of(config, "system/cpu_utilization_percentage")


def test_adapters_are_model_versions_that_peft_loads(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, _, _ = trained
    client, _ = only_run(config)
    versions = client.search_model_versions("name='ogls-sd-flow-test'")
    assert sorted(int(v.tags["ogls.round"]) for v in versions) == [
        1,
        2,
    ]  # once each, although the run was resumed
    best = Run(config).records.manifest("health", 2).metrics["best"]
    assert client.get_model_version_by_alias("ogls-sd-flow-test", "best").tags["ogls.round"] == str(best)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking.uri)
    mlflow.set_tracking_uri(config.tracking.uri)
    ids = torch.tensor([[5, 6, 7, 8]])
    for address, round_ in (("models:/ogls-sd-flow-test@best", best), ("models:/ogls-sd-flow-test/latest", 2)):
        folder = mlflow.artifacts.download_artifacts(address)
        base = AutoModelForCausalLM.from_pretrained(config.model.path)
        loaded = PeftModel.from_pretrained(base, folder)
        policy = Run(config).load_policy(round_)
        with torch.inference_mode():
            expected = policy.logits(policy.run_body(ids).last_hidden_state)
            assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)


def test_adapters_are_copied_on_request(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.records.url("."), tmp_path / "tiny")
    config = tracked(tmp_path, "tracking.adapters=copy")
    track(config, 2)
    client, run = only_run(config)
    files = {a.path for a in client.list_artifacts(run.info.run_id, "adapters/round=002")}
    assert {p.rsplit("/", 1)[1] for p in files} == {"adapter_config.json", "adapter_model.safetensors"}
    path = client.download_artifacts(run.info.run_id, "adapters/round=002/adapter_model.safetensors")
    assert Path(path).read_bytes() == finished.read_attachment(2, "adapter_model.safetensors")
    sources = {v.source for v in client.search_model_versions("name='ogls-sd-tiny'")}
    assert sources == {f"runs:/{run.info.run_id}/adapters/round={n:03d}" for n in (1, 2)}


def test_tracking_a_round_asks_mlflow_for_as_much_in_a_long_run(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No history of a metric, and no list of all model versions."""
    from mlflow.tracking import MlflowClient

    make_history(finished, str(tmp_path), 12)
    track(tracked(tmp_path), 11)
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: pytest.fail("a history was read"))
    found: list[int] = []
    search = MlflowClient.search_model_versions
    monkeypatch.setattr(MlflowClient, "search_model_versions", lambda *a: (r := search(*a), found.append(len(r)))[0])
    with counted() as cost:
        track(tracked(tmp_path), 12)
    assert {int(path.split("=")[1][:3]) for path in cost.paths if "/round=" in path} <= {0, 1, 2, 12}
    assert max(found) == 1
    monkeypatch.undo()
    assert [step for step, _ in metrics_of(tracked(tmp_path), "evaluate/accuracy")] == list(range(13))


def test_a_server_gets_the_name_of_a_folder_of_a_disk(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the folder itself. A store with a URL is referred to."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    logged: dict[str, Any] = {}

    class Client:
        def log_dict(self, run_id: str, content: Any, path: str) -> None:
            logged[path] = content

    log_adapter(Client(), "run", finished, 2)
    folder = finished.records.url("policy/round=002")
    assert logged["adapters/round=002/stored.json"]["adapter"] == folder
    assert adapter_source("run", finished, 2) == "runs:/run/adapters/round=002"
    remote = make_history(finished, "memory://referred", 2)
    assert adapter_source("run", remote, 2) == "memory://referred/tiny/policy/round=002"
    monkeypatch.undo()
    assert adapter_source("run", finished, 2) == Path(folder).as_uri()


def test_the_report_is_in_mlflow_and_linked_from_the_last_round(trained: tuple) -> None:
    config, _, _ = trained
    client, run = only_run(config)
    page = Path(client.download_artifacts(run.info.run_id, "report/report.html")).read_text()
    assert page == read_report(Run(config))
    assert "OGLS-SD: flow-test" in page
    artifacts = {a.key: a.data for a in from_server("read_artifacts") if a.key and a.key.startswith("flow-test-r0")}
    assert "The report of the whole run" in artifacts["flow-test-r002"]
    assert "The report" not in artifacts["flow-test-r000"]
    modified = Path(Run(config).records.url("report.html")).stat().st_mtime_ns
    write_report(Run(config))  # the run has no new rounds, so the file is not rewritten
    assert Path(Run(config).records.url("report.html")).stat().st_mtime_ns == modified


def test_an_error_in_the_report_does_not_fail_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError("no room")

    monkeypatch.setattr("ogls.analysis.report.write_report", fail)
    console = rich.console.Console(file=io.StringIO(), width=200)
    show_progress_on(console)
    train_flow(tracked(tmp_path, "name=unreported", "rounds=1", "tracking.enabled=false", "tracking.report=plain"))
    show_progress_on(None)
    output = console.file.getvalue()
    assert "the report was not written (OSError: no room); `ogls report unreported` writes it" in output
    assert newest_flow_run("train unreported").state_name == "Completed"


def test_style_is_logged_as_metrics_and_health_as_tags(trained: tuple) -> None:
    from mlflow.tracking import MlflowClient

    config, _, _ = trained
    style_metrics = Run(config).records.manifest("style", 2).metrics["numbers"]
    for name in ("target_style_share", "direction_style_share", "reference_kl", "correct_kl_at_substance"):
        assert [step for step, _ in metrics_of(config, f"style/{name}")] == [1, 2]
        assert metrics_of(config, f"style/{name}")[1][1] == pytest.approx(style_metrics[name])
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    health = Run(config).records.manifest("health", 2).metrics
    assert run.data.tags["ogls.health"] == health["state"]
    assert run.data.tags["ogls.best_round"] == str(health["best"])


def test_a_collapse_is_shown_in_prefect_and_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    events: list[dict[str, Any]] = []
    monkeypatch.setattr("tasks.events.emit_event", lambda **event: events.append(event))

    opsd = ("steer.recipe=opsd", "train.rollouts=all", "train.divergence=forward_kl", "train.learning_rate=5e-3")
    config = tracked(tmp_path, "name=collapse", "rounds=3", "health.short=stop", *opsd)
    with pytest.raises(HealthStop, match="the median length fell"):
        train_flow(config)
    flow = newest_flow_run("train collapse")
    assert flow.state_name == "Failed"
    assert "the median length fell" in flow.state.message
    assert {r.name for r in task_runs(flow) if r.name.endswith("r002")} == set()  # the run ended with round 1
    (artifact,) = [a for a in from_server("read_artifacts") if a.key == "collapse-r001"]
    assert "the run is stopped. Best so far: round 0, the base model" in artifact.data
    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags["ogls.health"] == "stop"
    assert "the median length fell" in run.data.tags["ogls.health.why"]
    names = [(e["event"], e["payload"].get("round")) for e in events]
    assert names == [
        *(("ogls.round.finished", 0), ("ogls.round.best", 0)),
        *(("ogls.round.finished", 1), ("ogls.run.collapsed", 1)),
    ]
    assert events[-1]["resource"]["prefect.resource.id"] == "ogls.run.collapse"
    assert "the median length fell" in events[-1]["payload"]["notice"]
    Path(Run(config).records.url("scores/round=001/part-0000.parquet")).unlink()
    with pytest.raises(HealthStop):  # the recorded decision applies when the run is started again
        train_flow(config)
    (redone,) = [e["payload"] for e in events if e["event"] == "ogls.stage.redone"]
    assert (redone["stage"], redone["round"]) == ("evaluate", 1)
    assert "part-0000.parquet is missing" in redone["why"]


def test_training_continues_with_one_warning_if_mlflow_is_unavailable(
    tmp_path: Path, console_output: pytest.CaptureFixture[str]
) -> None:
    config = tracked(tmp_path, "name=unavailable", "rounds=1", "tracking.uri=postgresql://user:secret@127.0.0.1:9/db")
    train_flow(config)
    output = console_output.readouterr().out
    assert output.count("is unavailable") == 1
    assert "MLflow at postgresql://127.0.0.1:9/db is unavailable" in output
    assert "secret" not in output
    assert newest_flow_run("train unavailable").state_name == "Completed"
    assert Run(config).records.manifest("scores", 1)


def test_rounds_missing_in_mlflow_are_logged_later(tmp_path: Path) -> None:
    train_flow(tracked(tmp_path, "name=later", "rounds=1", "tracking.uri=http://127.0.0.1:9"))
    config = tracked(tmp_path, "name=later", "rounds=1")
    train_flow(config)
    assert [step for step, _ in metrics_of(config, "evaluate/accuracy")] == [0, 1]


def test_an_evaluation_made_later_reaches_mlflow(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = tracked(tmp_path, "name=evaluated-later", "rounds=2", "evaluate.every=2")
    train_flow(config)
    assert [step for step, _ in metrics_of(config, "evaluate/accuracy")] == [0, 2]
    evaluate_flow(config, [1])
    accuracies = dict(metrics_of(config, "evaluate/accuracy"))
    assert sorted(accuracies) == [0, 1, 2]
    assert sorted(step for step, _ in metrics_of(config, "rounds_logged")) == [0, 1, 2]
    versions = MlflowClient(tracking_uri=config.tracking.uri).search_model_versions("name='ogls-sd-evaluated-later'")
    assert {v.tags["ogls.round"]: float(v.tags["ogls.accuracy"]) for v in versions} == {
        "1": pytest.approx(accuracies[1]),
        "2": pytest.approx(accuracies[2]),
    }


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours handles it."""


def test_a_round_whose_publication_was_killed_is_published_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each effect on Prefect and MLflow in turn, before the next line."""
    from mlflow.tracking import MlflowClient

    config = tracked(tmp_path, "name=killed", "rounds=1", "tracking.adapters=copy")
    carry_out(config)
    killed: list[str] = []
    events: list[tuple[str, Any]] = []

    def killing(target: Any, name: str, real: Any) -> None:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = real(*arguments, **keywords)
            metrics = "".join(f"{m.key} {m.step}" for m in keywords.get("metrics", ())[:1])
            point = f"{name} {keywords.get('key', '')}{keywords.get('id', '')}{metrics}"
            if point not in killed:
                killed.append(point)
                raise Killed
            return result

        monkeypatch.setattr(target, name, call)

    killing(publishing, "create_markdown_artifact", create_markdown_artifact)
    for method in ("log_batch", "log_artifacts", "create_model_version", "set_registered_model_alias", "log_param"):
        killing(MlflowClient, method, getattr(MlflowClient, method))
    killing(task_events, "emit_event", lambda **event: events.append((event["event"], event["id"])))
    for round_ in (0, 1):
        while True:
            try:
                publishing.publish.fn(config, round_)
                break
            except Killed:
                continue
    assert len(killed) == 14, killed
    tables = [a.key for a in from_server("read_artifacts") if a.key and a.key.startswith("killed-r")]
    assert sorted(tables) == ["killed-r000", "killed-r001"]
    assert [name for name, _ in set(events)].count("ogls.round.finished") == 2
    assert len(events) > len(set(events)) == len({i for _, i in events})  # the server stores an id once
    for name in ("evaluate/accuracy", "rounds_logged", "train/rate"):
        assert sorted(step for step, _ in metrics_of(config, name)) == [0, 1]
    client = MlflowClient(tracking_uri=config.tracking.uri)
    assert len(client.search_model_versions("name='ogls-sd-killed'")) == 1
    publishing.publish.fn(config, 1)
    assert len([a for a in from_server("read_artifacts") if a.key == "killed-r001"]) == 1
