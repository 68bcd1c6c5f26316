"""Flow runs on a real Prefect server: states, names, tags, artifacts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import from_server, newest_flow_run, task_runs, tracked

from flows.evaluate import evaluate_flow
from flows.train import train_flow
from ogls.records.stages import STAGES
from ogls.stages.run import Run

pytestmark = pytest.mark.usefixtures("prefect_server")
ROUND = ("sample", "verify", "teach", "steer", "style", "train", "evaluate", "health", "publish")


def test_task_runs_are_named_by_stage_and_round(trained: tuple) -> None:
    _, first, second = trained
    assert first.id != second.id
    assert {first.state_name, second.state_name} == {"Completed"}
    names = Counter(run.name for run in task_runs(second))
    # It begins at the newest trained round.
    resumed = ["prepare r000", "evaluate r001", "health r001", "publish r001"]
    rounds = [*(f"{name} r002" for name in ROUND), "drop old files r001", "drop old files r002"]
    expected = [*resumed, *rounds, "report"]
    assert names == Counter(expected)


def test_finished_stages_show_as_already_done(trained: tuple) -> None:
    _, first, second = trained
    assert {r.state_name for r in task_runs(first)} == {"Completed"}
    states = {r.name: r.state_name for r in task_runs(second) if not r.name.startswith(("publish", "drop"))}
    reused = {name for name, state in states.items() if state == "Already done"}
    assert reused == {n for n in states if n.endswith(("r000", "r001"))}
    assert {state for name, state in states.items() if name not in reused} == {"Completed"}


def test_the_table_of_rounds_is_an_artifact(trained: tuple) -> None:
    config, _, second = trained
    tables = [a for a in from_server("read_artifacts") if a.type == "markdown" and a.key.startswith("flow-test-r")]
    artifacts = {a.key: a for a in tables}
    assert sorted(a.key for a in tables) == ["flow-test-r000", "flow-test-r001", "flow-test-r002"]  # each once
    assert [a.key for a in tables if a.flow_run_id == second.id] == ["flow-test-r002"]
    markdown = artifacts["flow-test-r002"].data
    summary = Run(config).records.read("summaries", 2).to_pylist()[0]
    assert f"| 2 | {summary['accuracy']:.3f} |" in markdown
    assert markdown.count("sample ") >= 3
    assert "\\boxed" in markdown
    assert "![accuracy and length by round](data:image/png;base64,iVBOR" in markdown
    assert len(markdown) < 80_000  # with the image; there is one artifact per round


def test_progress_artifacts_end_at_100_percent(trained: tuple) -> None:
    """One artifact per stage, with a version per round. test_artifacts.py tests the updates during a stage."""
    from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

    keys = [f"flow-test-{stage.name}" for stage in STAGES if stage.unit]
    by_key = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=keys))
    artifacts = {a.key: a for a in from_server("read_latest_artifacts", artifact_filter=by_key)}
    assert sorted(artifacts) == sorted(keys)
    for key, artifact in artifacts.items():
        assert (artifact.type, artifact.data) == ("progress", 100.0)
        assert re.search(rf"r002 {key.removeprefix('flow-test-')}: done, \d+ rows in", artifact.description)


def test_flow_runs_are_tagged_by_method_and_model(trained: tuple) -> None:
    _, first, second = trained
    assert set(first.tags) == set(second.tags) == {"method: ogls-sd", "model: tiny/model"}


def test_a_dead_flow_run_is_marked_as_crashed_by_the_next_process(tmp_path: Path) -> None:
    """A killed process leaves its flow run Running until another process holds the run."""
    from prefect.states import Running

    config = tracked(tmp_path, "name=dead", "rounds=0")
    other_store = tracked(tmp_path / "other", "name=dead", "rounds=0")
    for same_name in (config, other_store):
        from_server(
            "create_flow_run",
            flow=train_flow,
            parameters={"config": same_name.model_dump(mode="json")},
            name="train dead",
            state=Running(),
        )
    train_flow(config)
    runs = from_server("read_flow_runs")
    states = {(r.parameters["config"]["root"], r.state_name) for r in runs if r.name == "train dead"}
    assert states == {(config.root, "Crashed"), (config.root, "Completed"), (other_store.root, "Running")}


def test_a_flow_run_that_fails_meanwhile_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder of the run reads it as Running; it fails before the holder can mark it as Crashed."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.states import Failed, Running

    config = tracked(tmp_path, "name=refused", "rounds=0")
    parameters, name = {"config": config.model_dump(mode="json")}, "train refused"
    other = from_server("create_flow_run", flow=train_flow, parameters=parameters, name=name, state=Running())
    read_flow_runs, responses = SyncPrefectClient.read_flow_runs, []

    def read_then_fail(client: SyncPrefectClient, **arguments: Any) -> Any:
        flow_runs = read_flow_runs(client, **arguments)
        if any(run.id == other.id for run in flow_runs):
            responses.append(client.set_flow_run_state(other.id, Failed(message="run refused is held")))
        return flow_runs

    monkeypatch.setattr(SyncPrefectClient, "read_flow_runs", read_then_fail)
    train_flow(config)
    monkeypatch.undo()
    assert len(responses) == 1
    (run,) = [r for r in from_server("read_flow_runs") if r.id == other.id]
    assert (run.state_name, run.state.message) == ("Failed", "run refused is held")


def test_a_method_without_a_teacher_has_no_teacher_tasks(tmp_path: Path) -> None:
    train_flow(tracked(tmp_path, "name=no-teacher", "rounds=1", "train.objective=grpo", "tracking.enabled=false"))
    names = {r.name for r in task_runs(newest_flow_run("train no-teacher"))}
    assert {n for n in names if n.endswith("r001")} == {
        *("sample r001", "verify r001", "train r001", "evaluate r001", "health r001", "publish r001"),
        "drop old files r001",
    }


def test_the_evaluate_flow_evaluates_selected_rounds(trained: tuple) -> None:
    config, _, _ = trained
    assert evaluate_flow(config) == [2]
    assert evaluate_flow(config, [0, 1]) == [0, 1]


def test_the_parameters_of_the_flow_are_the_settings() -> None:
    """The UI builds its form from the schema of the parameters: sections, fields, descriptions and defaults."""
    schema = train_flow.parameters.model_dump()
    sections = schema["definitions"]["RunConfig"]["properties"]
    assert {"model", "rollout", "teacher", "steer", "train", "evaluate"} <= set(sections)
    rate = schema["definitions"]["TrainConfig"]["properties"]["learning_rate"]
    assert rate["default"] == 1e-4
    assert "AdamW" in rate["description"]
