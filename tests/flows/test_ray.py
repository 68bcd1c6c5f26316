"""`ogls up --ray`, and the cluster files of deployments/ray."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import REPO

from flows.service_commands import down, start_ray
from flows.services import Services, use_running
from ogls.execution.ray_cluster import accepts_connections

RAY_FILES = REPO / "deployments/ray"
SCHEMA = "autoscaler/ray-schema.json"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY_FILES / name).read_text())
    return found


@pytest.mark.nightly
def test_up_starts_a_cluster_on_loopback_and_down_stops_exactly_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    services, other = Services(tmp_path), subprocess.Popen(["sleep", "600"])
    # `ray start` asks for the token of the machine, if it has one; every run with a cluster of its own makes one.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(secrets.token_hex(32))

    def connect(**environment: str) -> str:
        program = f"from ogls.execution.ray_cluster import connect; print('connected to', connect('{address}'))"
        command, env = [sys.executable, "-c", program], {**os.environ, **environment}
        result = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    try:
        with services.lock():
            address = start_ray(services, port)
            assert start_ray(services, port) == address == f"127.0.0.1:{port}"  # it is running already
        assert f"connected to {address}" in connect()
        assert "if it runs and has a token, give this machine the same one" in connect(RAY_AUTH_TOKEN="0" * 32)
        (service,) = services.running().values()
        family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
        assert {"gcs_server", "raylet"} <= {p.name() for p in family}
        sockets = [c for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert port in {c.laddr.port for c in sockets}
        assert {c.laddr.ip.removeprefix("::ffff:") for c in sockets} == {"127.0.0.1"}
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        use_running(tmp_path)
        assert os.environ["RAY_ADDRESS"] == address
        monkeypatch.delenv("RAY_ADDRESS")
        down(tmp_path)
        assert "ray: stopped" in capsys.readouterr().out
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not accepts_connections(address)
        assert other.poll() is None
    finally:
        with services.lock():
            services.stop("ray")
        other.kill()


def test_the_cluster_file_for_ssh_passes_the_checks_of_ray() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = Path(ray.__file__).parent / SCHEMA
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--schemafile", schema, RAY_FILES / "cluster.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    config = prepare_config(load("cluster.yaml"))
    validate_config(config)
    (node_type,) = config["available_node_types"].values()
    assert node_type["max_workers"] == len(load("cluster.yaml")["provider"]["worker_ips"])


def test_the_kuberay_files_have_one_version_and_known_settings() -> None:
    """No schema of KubeRay is installed here, so the fields that matter are compared with the project."""
    from ogls.config import load_config

    pins = (REPO / "constraints.txt").read_text().splitlines()
    cluster, job = load("raycluster.yaml"), load("rayjob.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for spec in (cluster["spec"], job["spec"]["rayClusterSpec"]):
        assert f"ray=={spec['rayVersion']}" in pins
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for group in groups:
            (container,) = group["template"]["spec"]["containers"]
            volumes = {v["name"] for v in group["template"]["spec"].get("volumes", ())}
            assert {m["name"] for m in container.get("volumeMounts", ())} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["ogls", "train", "tiny"]
    overrides = [b for a, b in pairwise(words) if a == "--set"]
    config = load_config(REPO / "deployments/runs/tiny.toml", overrides)
    assert (config.execution.workers, config.root) == ("ray", "s3://bucket/runs")
