"""The process of an engine, with a package `vllm` that only starts children: all of them die with it, in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPO, small_config

from ogls.errors import ModelError
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.samplers import vllm
from ogls.samplers.vllm import VllmSampler, engine_settings
from ogls.samplers.vllm_process import EngineDied, VllmProcess

_FAKE_VLLM = """
import multiprocessing, os, pathlib, subprocess, sys, time, types

class LLM:
    def __init__(self, pids, **_):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        other = subprocess.Popen(["sleep", "600"])
        pathlib.Path(pids).write_text(f"{os.getpid()} {child.pid} {other.pid}")
    def sleep(self, level):
        while True: pass
    def wake_up(self):
        raise ValueError("out of order")
    def collective_rpc(self, *_, **__):
        pass
    def reset_prefix_cache(self):
        pass
    class llm_engine:
        left = 3
        def add_request(*_, **__):
            pass
        def has_unfinished_requests():
            return LLM.llm_engine.left > 0
        def step():
            LLM.llm_engine.left -= 1
            output = types.SimpleNamespace(token_ids=[7], logprobs=[{7: types.SimpleNamespace(logprob=-1.0)}])
            return [types.SimpleNamespace(finished=True, request_id=str(LLM.llm_engine.left), outputs=[output])]

SamplingParams = dict
sampling_params = types.ModuleType("vllm.sampling_params")
sampling_params.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY=2)
sys.modules["vllm.sampling_params"] = sampling_params
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    (tmp_path / "vllm.py").write_text(_FAKE_VLLM)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"engine": {"pids": str(tmp_path / "pids")}, "environment": {}}


def processes(settings: dict) -> list[psutil.Process]:
    found = [psutil.Process(int(pid)) for pid in Path(settings["engine"]["pids"]).read_text().split()]
    assert len(found) == 3
    return found


def assert_ended(family: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
        assert time.monotonic() < deadline, family
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["close", "stall", "failure", "killed"])
def test_an_engine_may_have_children_and_they_die_with_it(settings: dict, end: str) -> None:
    engine = VllmProcess(settings)
    family, folder = processes(settings), Path(engine.folder.name)
    if end == "close":
        engine.close()
    elif end == "stall":
        with pytest.raises(EngineDied, match="did not respond to sleep within 0 s"):
            engine.call("sleep", None, 0.3)
    elif end == "failure":
        with pytest.raises(EngineDied, match="out of order"):
            engine.call("wake", None, 10.0)
    else:
        os.kill(family[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="wake"):
            engine.call("wake", None, 10.0)
    assert_ended(family)
    assert not folder.exists()


def test_results_that_were_not_taken_reach_no_later_call(settings: dict) -> None:
    whole = VllmProcess(settings)
    assert list(whole.stream("sample", ([[1]] * 3, [{}] * 3), 10.0)) == [(n, ((7,), (-1.0,))) for n in (2, 1, 0)]
    whole.call("reload", "folder", 10.0)
    whole.close()
    stopped = VllmProcess(settings)
    stream = stopped.stream("sample", ([[1]] * 3, [{}] * 3), 10.0)
    next(stream)
    with pytest.raises(EngineDied, match="the results of an earlier command were not taken"):
        stopped.call("reload", "folder", 10.0)
    closed = VllmProcess(settings)
    stream = closed.stream("sample", ([[1]] * 3, [{}] * 3), 10.0)
    next(stream)
    stream.close()
    assert not closed.alive()


@pytest.mark.parametrize("end", ["SIGKILL", "exit"])
def test_an_engine_and_its_children_die_with_a_busy_parent(settings: dict, end: str, tmp_path: Path) -> None:
    """Also while the engine hangs, and if the parent has no chance to end it."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, threading\n"
        "from ogls.samplers.vllm_process import VllmProcess\n"
        "if __name__ == '__main__':\n"
        f"    engine = VllmProcess({settings!r})\n"
        "    engine.connection.send(('sleep', None))\n"
        "    print(engine.folder.name, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    command = [sys.executable, str(script)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as parent:
        folder = Path(parent.stdout.readline().strip())
        family = processes(settings)
        if end == "SIGKILL":
            parent.kill()
    assert_ended(family)
    assert not folder.exists()


class FakeEngine:
    """An engine that records calls; `folder` has what an engine finds on disk."""

    def __init__(self, folder: Path):
        self.folder = type("Folder", (), {"name": str(folder)})
        self.calls: list[str] = []
        self.weights, self.asleep, self.swaps = "base", False, 0

    def alive(self) -> bool:
        return True

    def call(self, command: str, payload: object, seconds: float) -> list:
        if command in ("adapt", "reload") and payload:
            path = Path(payload[1] if isinstance(payload, tuple) else payload)
            assert any(path.glob("*.safetensors"))
        self.calls.append(command)
        return []


@pytest.mark.parametrize("lora", [True, False])
def test_swapped_adapters_do_not_stay_on_disk(
    lora: bool, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rounds leave the files of one adapter: the one in use, which vLLM may read again."""
    config = small_config("x", "rollout.engine=vllm", "adapter.rank=4", "adapter.alpha=8")
    sampler = VllmSampler(config)
    if lora:
        sampler.settings = engine_settings(config, cuda=True)
    engine = FakeEngine(tmp_path)
    monkeypatch.setattr(sampler, "_engine", lambda: engine)
    weights = policy.initial_adapter().weights
    for number in range(5):
        sampler.use_adapter(Adapter(weights, f"hash{number}"))
        assert len(list(tmp_path.iterdir())) == lora
    sampler.use_adapter(None)
    assert engine.calls == (["adapt"] if lora else ["reload"]) * 6


def test_memory_is_given_back_before_an_engine_first_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[str] = []
    monkeypatch.setattr(vllm, "_engines", {})
    monkeypatch.setattr(vllm, "_empty_cache", lambda: events.append("empty"))
    monkeypatch.setattr(vllm, "VllmProcess", lambda _: events.append("start") or FakeEngine(tmp_path))
    VllmSampler(small_config("x", "rollout.engine=vllm"))._engine()
    assert events == ["empty", "start"]


@pytest.mark.parametrize(("rank", "maximum"), [(1, 1), (4, 8), (16, 16), (24, 32), (300, 320), (512, 512)])
def test_lora_ranks_between_those_of_vllm_are_taken(rank: int, maximum: int) -> None:
    config = small_config("x", "rollout.engine=vllm", f"adapter.rank={rank}")
    assert engine_settings(config, cuda=True)["engine"]["max_lora_rank"] == maximum


def test_a_lora_rank_that_vllm_does_not_take_is_refused_before_the_first_rollout() -> None:
    config = small_config("x", "rollout.engine=vllm", "adapter.rank=513")
    with pytest.raises(ModelError, match=r"adapter\.rank is 513, and vLLM takes LoRA adapters up to rank 512"):
        engine_settings(config, cuda=True)
    engine_settings(config, cuda=False)  # merged into the weights
