"""`ogls up` with the shipped deployments, a scheduled flow run on the worker, and `ogls down`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import REPO, small_config
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from services_fixture import ServiceStack, wait_for_scheduled_run

from flows.services import Services, responds
from ogls.config import RunConfig, load_config
from ogls.stages.run import Run
from ogls.store import Store
from tasks import register

SHIPPED = yaml.safe_load((REPO / "deployments/prefect.yaml").read_text())


@pytest.mark.parametrize("deployment", SHIPPED["deployments"], ids=lambda d: d["name"])
def test_shipped_parameters_are_the_tiny_configuration(deployment: dict[str, Any]) -> None:
    assert deployment["description"]
    assert deployment["tags"]
    assert deployment["work_pool"]["name"] == "ogls"
    assert load_flow_from_entrypoint(deployment["entrypoint"]).name
    if "config" in deployment["parameters"]:
        given = RunConfig.model_validate(deployment["parameters"]["config"])
        expected = load_config(REPO / "deployments/runs/tiny.toml", [f"name={given.name}", "execution.limit=ogls-gpu"])
        assert given == expected
    else:
        assert (REPO / deployment["parameters"]["study"]).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_deployed_on_loopback(services: ServiceStack) -> None:
    assert f"Prefect     http://127.0.0.1:{services.ports[0]}" in services.output
    assert f"MLflow      http://127.0.0.1:{services.ports[1]}" in services.output
    deployed = {d["name"]: d for d in services.request("POST", "/deployments/filter", {})}
    assert set(deployed) == {d["name"] for d in SHIPPED["deployments"]}
    assert [s["schedule"]["cron"] for s in deployed["nightly"]["schedules"]] == ["0 2 * * *"]
    config = deployed["tiny"]["parameter_openapi_schema"]["definitions"]["RunConfig"]["properties"]
    assert config["teacher"]["description"] == "The teacher pass."
    limits = {limit["name"]: limit["limit"] for limit in services.request("POST", "/v2/concurrency_limits/filter", {})}
    assert limits["ogls-gpu"] == 1
    # The automations that send notifications are skipped while the notification block does not exist.
    assert [a["name"] for a in services.request("POST", "/automations/filter", {})] == ["ogls: a run has gone silent"]
    slack = services.request("GET", "/block_types/slug/slack-webhook")
    by_type = {"block_schemas": {"block_type_id": {"any_": [slack["id"]]}}}
    schema = services.request("POST", "/block_schemas/filter", by_type)[0]
    block = {"name": "ogls-alerts", "data": {"url": "https://127.0.0.1:1/none"}, "block_type_id": slack["id"]}
    services.request("POST", "/block_documents/", {**block, "block_schema_id": schema["id"]})
    client = {**services.environment, "PREFECT_API_URL": services.api}
    arguments = ("deploy", "--root", str(services.folder / "root"))
    deploy = [sys.executable, "-m", "flows.cli", *arguments]
    assert "3 automations" in subprocess.run(deploy, cwd=REPO, env=client, capture_output=True, text=True).stdout
    automations = {a["name"]: a for a in services.request("POST", "/automations/filter", {})}
    assert set(automations) == {
        f"ogls: {n}" for n in ("a run has gone silent", "a run has collapsed", "a flow run has failed")
    }
    assert automations["ogls: a run has collapsed"]["trigger"]["expect"] == ["ogls.run.collapsed"]
    for service in Services(services.folder).running().values():
        family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
        listening = [c for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}
        assert not [p for p in family if "job" in " ".join(p.cmdline())]  # the job processes of MLflow are off


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_were_trained_elsewhere_are_shown_once(services: ServiceStack, finished: Run) -> None:
    root = services.folder / "root"
    shutil.copytree(finished.records.storage.path, root, dirs_exist_ok=True)
    shutil.copytree(root / "tiny", root / "half")
    info = json.loads((root / "half/run.json").read_text())
    (root / "half/run.json").write_text(json.dumps({**info, "config": {**info["config"], "name": "half", "rounds": 9}}))
    assert f"registered  2 runs of {root}" in services.up()
    assert services.flow_run_states("train tiny") == ["Completed"]
    assert services.flow_run_states("train half") == ["Crashed"]
    (artifact,) = services.request("POST", "/artifacts/filter", {"artifacts": {"key": {"any_": ["tiny-r002"]}}})
    assert artifact["data"].startswith("# tiny, round 2")
    assert "| 2 |" in artifact["data"]
    assert "The problem:" in artifact["data"]
    assert artifact["flow_run_id"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_flow_run_whose_process_died_unseen_is_marked_at_the_next_start(
    services: ServiceStack, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = services.folder / "dead"
    shutil.copytree(finished.records.storage.path, root, dirs_exist_ok=True)
    (match,) = [d for d in services.request("POST", "/deployments/filter", {}) if d["name"] == "tiny"]
    flow = {"flow_id": match["flow_id"], "state": {"type": "RUNNING"}, "parameters": {"config": {"root": str(root)}}}
    for name in ("train tiny", "train unknown", "evaluate tiny"):
        services.request("POST", "/flow_runs/", {**flow, "name": name})
    monkeypatch.setenv("PREFECT_API_URL", services.api)
    monkeypatch.setattr(register, "_JUST_BEGUN", timedelta(seconds=0))
    with temporary_settings({PREFECT_API_URL: services.api}):
        with Store(str(root)).run("tiny").lock("train"):
            assert register.mark_dead_flow_runs(Store(str(root))) == 0
        assert register.mark_dead_flow_runs(Store(str(root))) == 2
        assert register.mark_dead_flow_runs(Store(str(root))) == 0
    assert services.flow_run_states("train unknown") == ["Running"]
    assert services.flow_run_states("evaluate tiny") == ["Crashed"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_scheduled_flow_runs_and_a_second_one_finds_nothing_new(services: ServiceStack, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rows = (REPO / "data/tiny/train.jsonl").read_text().splitlines()[:8]
    (source / "monday.jsonl").write_text("\n".join(rows) + "\n")
    config = small_config(
        tmp_path / "runs",
        *("name=nightly", "rounds=1", f"problems.source={source}", "execution.limit=ogls-gpu"),
        *("tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{services.ports[1]}", "tracking.experiment=nightly"),
    )
    (nightly,) = [d for d in services.request("POST", "/deployments/filter", {}) if d["name"] == "nightly"]
    parameters = {"parameters": {"config": config.model_dump(mode="json")}}
    services.request("PATCH", f"/deployments/{nightly['id']}", parameters)
    soon = (datetime.now(UTC) + timedelta(seconds=15)).replace(microsecond=0)
    daily = {"interval": 86400, "anchor_date": soon.isoformat(), "timezone": "UTC"}
    services.request("POST", f"/deployments/{nightly['id']}/schedules", [{"active": True, "schedule": daily}])
    scheduled = wait_for_scheduled_run(services, nightly["id"], soon)
    assert scheduled["state_name"] == "Completed", scheduled["state"]
    second = services.wait_for_end(services.start_deployment(config, "nightly"))
    assert second["state_name"] == "Nothing new", second["state"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nightly-0001"]
    assert len(mlflow_runs(services)) == 1
    assert Run(config.model_copy(update={"name": "nightly-0001"})).records.rounds("scores") == [0, 1]
    by_run = {"event": {"name": ["ogls.round.finished"]}, "resource": {"id": ["ogls.run.nightly-0001"]}}
    events = services.request("POST", "/events/filter", {"filter": by_run})["events"]
    assert sorted(e["payload"]["round"] for e in events) == [0, 1]


def mlflow_runs(services: ServiceStack) -> list[Any]:
    """The MLflow runs of the experiment `nightly`."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{services.ports[1]}")
    experiment = client.get_experiment_by_name("nightly")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_again_starts_only_what_is_missing(services: ServiceStack) -> None:
    before = Services(services.folder).running()
    psutil.Process(before["worker"].pid).kill()
    output = services.up()
    assert "the Prefect server is already running" in output
    assert "MLflow is already running" in output
    assert "starting the worker" in output
    assert "registered" not in output
    after = Services(services.folder).running()
    assert {n: s.pid for n, s in after.items() if n != "worker"} == {
        n: s.pid for n, s in before.items() if n != "worker"
    }
    assert len(services.request("POST", "/automations/filter", {})) == 3  # updated, not created a second time


@pytest.mark.slow
def test_a_used_port_is_an_error_that_names_its_process(services: ServiceStack, tmp_path: Path) -> None:
    other = ServiceStack(tmp_path / "other")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        other.ports[0] = used.getsockname()[1]
        output = other.up(code=2)
    assert f"port {other.ports[0]} is used by process {os.getpid()}" in output
    assert f"ogls up --prefect-port {other.ports[0] + 1}" in output


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_server_that_was_already_running_is_used_and_not_stopped(services: ServiceStack, tmp_path: Path) -> None:
    second = ServiceStack(tmp_path / "second")
    second.ports = services.ports
    output = second.up()
    assert output.count("that was not started here responds") == 2
    assert set(Services(second.folder).running()) == {"worker"}
    assert second.ogls("down").splitlines() == ["worker: stopped"]
    assert responds(f"{services.api}/health", "true")
    assert set(Services(services.folder).running()) >= {"prefect", "mlflow"}
