"""Runs at the same time on a machine with several GPUs: which one each of them takes, and what its stages wait for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, small_config

from ogls.config import RunConfig
from tasks import devices

# Takes a GPU, says which one, and keeps it until its input ends.
TAKER = """
import json, os, sys
from ogls.config import RunConfig
from tasks.devices import take_gpu
config = RunConfig.model_validate_json(sys.argv[1])
print(json.dumps([take_gpu(config), take_gpu(config), os.environ["CUDA_VISIBLE_DEVICES"]]), flush=True)
sys.stdin.read()
"""


def start(config: RunConfig, tmp_path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", TAKER, config.model_dump_json()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def took(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    answer: list[str] = json.loads(process.stdout.readline())
    return answer


def test_each_run_takes_the_gpu_that_the_fewest_others_use(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    processes = [start(config, tmp_path) for _ in range(4)]
    try:
        taken = [took(p)[0] for p in processes]
        assert sorted(taken) == ["0", "0", "1", "1"]
        for process in (p for p, gpu in zip(processes, taken, strict=True) if gpu == "1"):
            process.communicate("")
        processes.append(start(config, tmp_path))
        assert took(processes[-1]) == ["1"] * 3  # asked again, it stays, and its children see no other
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("visible", "settings"),
    [
        ("0", ()),
        ("", ()),
        ("0,1", ("train.parallel=ddp",)),
        ("0,1", ("execution.workers=ray",)),
        ("0,1", ("rollout.engine=auto", "rollout.vllm.tensor_parallel=2")),
        ("0,1", ("model.device=cpu",)),
    ],
)
def test_nothing_changes_with_one_gpu_or_for_a_run_that_uses_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, settings: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.take_gpu(small_config(tmp_path, *settings)) == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_run_on_several_gpus_sees_them_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    assert devices.take_gpu(small_config(tmp_path)) == os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert devices.take_gpu(small_config(tmp_path, "train.parallel=ddp")) == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_a_stage_waits_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch, prefect_server: None) -> None:
    from prefect.client.orchestration import get_client

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.limits_of("test-gpu") == ["test-gpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    both = [f"test-gpu-{socket.gethostname()}-{gpu}" for gpu in "01"]
    assert devices.limits_of("test-gpu") == both  # of a run that uses all of them
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(devices, "machine_gpus", lambda: ["0", "1"])
    assert devices.limits_of("test-gpu") == both[1:]  # also if it was restricted by hand
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(both[1]).limit == 1
