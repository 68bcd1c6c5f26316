"""`ogls up`, a schedule that really runs through the worker, and `ogls down`: with the shipped deployments."""

from __future__ import annotations

import os
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import REPO, small_config
from upped import Up, ended

from flows.services import Services, responds
from ogls.config import RunConfig, load_config
from ogls.stages.run import Run

SHIPPED = yaml.safe_load((REPO / "deployments/prefect.yaml").read_text())


@pytest.mark.parametrize("deployment", SHIPPED["deployments"], ids=lambda d: d["name"])
def test_shipped_parameters_are_the_tiny_configuration(deployment: dict[str, Any]) -> None:
    assert deployment["description"]
    assert deployment["tags"]
    assert deployment["work_pool"]["name"] == "ogls"
    file, flow = deployment["entrypoint"].split(":")
    assert re.search(rf"^def {flow}\(", (REPO / file).read_text(), re.MULTILINE)
    if "config" in deployment["parameters"]:
        given = RunConfig.model_validate(deployment["parameters"]["config"])
        wanted = load_config(REPO / "deployments/runs/tiny.toml", [f"name={given.name}", "execution.limit=ogls-gpu"])
        assert given == wanted
    else:
        assert (REPO / deployment["parameters"]["study"]).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_deployed_on_loopback(up: Up) -> None:
    assert f"Prefect     http://127.0.0.1:{up.ports[0]}" in up.said
    assert f"MLflow      http://127.0.0.1:{up.ports[1]}" in up.said
    deployed = {d["name"]: d for d in up.ask("POST", "/deployments/filter", {})}
    assert set(deployed) == {d["name"] for d in SHIPPED["deployments"]}
    assert [s["schedule"]["cron"] for s in deployed["nightly"]["schedules"]] == ["0 2 * * *"]
    config = deployed["tiny"]["parameter_openapi_schema"]["definitions"]["RunConfig"]["properties"]
    assert config["teacher"]["description"] == "The teacher pass."
    limits = {limit["name"]: limit["limit"] for limit in up.ask("POST", "/v2/concurrency_limits/filter", {})}
    assert limits["ogls-gpu"] == 1
    # Those that notify wait until there is a block to notify with.
    assert [a["name"] for a in up.ask("POST", "/automations/filter", {})] == ["ogls: a run has gone silent"]
    slack = up.ask("GET", "/block_types/slug/slack-webhook")
    schema = up.ask("POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [slack["id"]]}}})[0]
    block = {"name": "ogls-alerts", "data": {"url": "https://127.0.0.1:1/none"}, "block_type_id": slack["id"]}
    up.ask("POST", "/block_documents/", {**block, "block_schema_id": schema["id"]})
    up.up()
    automations = {a["name"]: a for a in up.ask("POST", "/automations/filter", {})}
    assert set(automations) == {
        f"ogls: {n}" for n in ("a run has gone silent", "a run has collapsed", "a flow run has failed")
    }
    assert automations["ogls: a run has collapsed"]["trigger"]["expect"] == ["ogls.run.collapsed"]
    for service in Services(up.folder).running().values():
        family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
        listening = [c for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}
        assert not [p for p in family if "job" in " ".join(p.cmdline())]  # MLflow's runners, for another trade


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_schedule_a_minute_ahead_runs_and_then_there_is_nothing_new(up: Up, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rows = (REPO / "data/tiny/train.jsonl").read_text().splitlines()[:8]
    (source / "monday.jsonl").write_text("\n".join(rows) + "\n")
    config = small_config(
        tmp_path / "runs",
        *("name=nightly", "rounds=1", f"problems.source={source}", "execution.limit=ogls-gpu"),
        *("tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{up.ports[1]}", "tracking.experiment=nightly"),
    )
    (nightly,) = [d for d in up.ask("POST", "/deployments/filter", {}) if d["name"] == "nightly"]
    up.ask("PATCH", f"/deployments/{nightly['id']}", {"parameters": {"config": config.model_dump(mode="json")}})
    soon = datetime.now(UTC) + timedelta(seconds=75)  # the next full minute is 15 s away or more
    cron = {"cron": f"{soon.minute} {soon.hour} {soon.day} {soon.month} *", "timezone": "UTC"}
    up.ask("POST", f"/deployments/{nightly['id']}/schedules", [{"active": True, "schedule": cron}])
    scheduled = ended(up, nightly["id"], soon.replace(second=0, microsecond=0))
    assert scheduled["state_name"] == "Completed", scheduled["state"]
    again = up.end_of(up.start(config, "nightly"))
    assert again["state_name"] == "Nothing new", again["state"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nightly-0001"]
    assert len(mlflow_runs(up)) == 1
    assert Run(config.model_copy(update={"name": "nightly-0001"})).records.rounds("scores") == [0, 1]
    ours = {"event": {"name": ["ogls.round.finished"]}, "resource": {"id": ["ogls.run.nightly-0001"]}}
    events = up.ask("POST", "/events/filter", {"filter": ours})["events"]
    assert sorted(e["payload"]["round"] for e in events) == [0, 1]


def mlflow_runs(up: Up) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{up.ports[1]}")
    experiment = client.get_experiment_by_name("nightly")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_again_starts_only_what_is_missing(up: Up) -> None:
    before = Services(up.folder).running()
    psutil.Process(before["worker"].pid).kill()
    said = up.up()
    assert "the Prefect server is already running" in said
    assert "MLflow is already running" in said
    assert "starting the worker" in said
    after = Services(up.folder).running()
    assert {n: s.pid for n, s in after.items() if n != "worker"} == {
        n: s.pid for n, s in before.items() if n != "worker"
    }
    assert len(up.ask("POST", "/automations/filter", {})) == 3  # renewed, not doubled


@pytest.mark.slow
def test_a_port_that_is_taken_is_said(up: Up, tmp_path: Path) -> None:
    other = Up(tmp_path / "other")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        other.ports[0] = taken.getsockname()[1]
        said = other.up(code=2)
    assert f"port {other.ports[0]} is used by process {os.getpid()}" in said
    assert f"ogls up --prefect-port {other.ports[0] + 1}" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_was_there_is_used_and_left_alone(up: Up, tmp_path: Path) -> None:
    guest = Up(tmp_path / "guest")
    guest.ports = up.ports
    said = guest.up()
    assert said.count("that was not started here responds") == 2
    assert set(Services(guest.folder).running()) == {"worker"}
    assert guest.ogls("down").splitlines() == ["worker: stopped"]
    assert responds(f"{up.api}/health", "true")
    assert set(Services(up.folder).running()) >= {"prefect", "mlflow"}
