"""vLLM (CPU build): seeds, stop tokens, log-probs, swapped weights, and killed engines.

The tests are skipped if vLLM is not installed; `.ci/run` installs it (`make vllm`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import REPO, carry_out, small_config
from padded import pad_heads

from flows.services import responds
from ogls.analysis.model_card import export_model
from ogls.config import RunConfig, SamplingConfig
from ogls.errors import ModelError, StoreError
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Request
from ogls.samplers.choose import create_sampler
from ogls.samplers.requests import build_requests
from ogls.samplers.vllm import VllmSampler, engine_settings, request_settings
from ogls.samplers.vllm_process import VllmProcess
from ogls.stages.engine import check_probe
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.workers import end_workers
from ogls.tinyworld.seedmodel import PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None and not os.environ.get("CI"), reason="vLLM is not installed"),
]
PROBLEMS = [Problem(f"p{i}", rf"Modulo 10, left to right: ${i}+4\times2-{'1+' * i}3$", "0") for i in range(5)]
SAMPLING = SamplingConfig(max_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pad_heads(REPO / "data" / "tiny" / "model", tmp_path_factory.mktemp("padded") / "model")


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("runs")
    return small_config(
        root, "name=fast", "rollout.engine=vllm", f"model.path={model}", "rollout.vllm.stall_seconds=300"
    )


@pytest.fixture(scope="module")
def policy(config: RunConfig) -> Policy:
    return Policy(config.model, config.adapter)


@pytest.fixture(scope="module")
def sampler(config: RunConfig) -> VllmSampler:
    sampler = create_sampler("vllm", None, config)
    sampler.use_adapter(None)
    return sampler


@pytest.fixture(scope="module")
def requests(policy: Policy) -> list[Request]:
    return build_requests(PROBLEMS, Prompter(policy.tokenizer, PROMPTS), 6, 0, "test")


def random_adapter(policy: Policy, scale: float = 0.05) -> Adapter:
    """The initial adapter plus random numbers, which change the completions of the model."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        n: w + scale * torch.randn(w.shape, generator=generator) for n, w in policy.initial_adapter().weights.items()
    }
    return Adapter.from_weights(weights)


def logprobs(policy: Policy, request: Request, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs (nats) of a completion under the policy in transformers, at temperature 1."""
    ids = torch.tensor([[*request.prompt_ids, *token_ids]])
    with torch.inference_mode():
        states = policy.run_body(ids).last_hidden_state[0, len(request.prompt_ids) - 1 : -1]
        return policy.logits(states).log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def test_logprobs_equal_those_of_transformers(sampler, policy: Policy, requests: list[Request]) -> None:
    """Log-probs are at temperature 1 and before the cuts, whatever the sampling settings; equal to 1e-3 in fp32."""
    cut = SamplingConfig(max_tokens=40, temperature=0.8, top_k=30, top_p=0.95, min_p=0.01)
    policy.use_adapter(None)
    for sampling in (SAMPLING, cut):
        for request, completion in zip(requests, sampler.sample(requests, sampling), strict=True):
            expected = logprobs(policy, request, completion.token_ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


def test_results_do_not_depend_on_batches_and_order(sampler, requests: list[Request]) -> None:
    whole = sampler.sample(requests, SAMPLING)
    assert [c.token_ids for c in sampler.sample(requests[::-1], SAMPLING)][::-1] == [c.token_ids for c in whole]
    assert sampler.sample(requests[7:8], SAMPLING)[0].token_ids == whole[7].token_ids
    assert len({c.token_ids for c in whole}) > 10


def test_stops_texts_and_truncation(sampler, policy: Policy, requests: list[Request]) -> None:
    greedy = SamplingConfig(max_tokens=40, temperature=0)
    ours = create_sampler("transformers", policy).sample(requests[::6], greedy)
    theirs = sampler.sample(requests[::6], greedy)
    assert [(c.token_ids, c.text, c.finish_reason) for c in theirs] == [
        (c.token_ids, c.text, c.finish_reason) for c in ours
    ]
    for completion in sampler.sample(requests, SAMPLING):
        assert (completion.token_ids[-1] in policy.stop_ids) == (completion.finish_reason == "stop")
    cut = sampler.sample(requests, SamplingConfig(max_tokens=3))
    assert all(len(c.token_ids) == 3 for c in cut if c.finish_reason == "length")


def test_an_adapter_changes_the_output_and_the_base_can_be_restored(
    sampler, policy: Policy, requests: list[Request]
) -> None:
    before = sampler.sample(requests, SAMPLING)
    process = sampler._engine().process.pid
    adapter = random_adapter(policy)
    sampler.use_adapter(adapter)
    assert sampler.hash == adapter.hash
    policy.use_adapter(adapter)
    after = sampler.sample(requests, SAMPLING)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    for request, completion in zip(requests, after, strict=True):
        expected = logprobs(policy, request, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)
    sampler.use_adapter(None)
    policy.use_adapter(None)
    assert [c.token_ids for c in sampler.sample(requests, SAMPLING)] == [c.token_ids for c in before]
    assert sampler._engine().process.pid == process  # without a restart


def test_samplers_share_an_engine_and_never_an_adapter_id(
    config: RunConfig, policy: Policy, requests: list[Request]
) -> None:
    """Every stage creates a sampler; a sampler never uses the adapter that another one loaded."""
    adapters = (random_adapter(policy), None, random_adapter(policy), random_adapter(policy, 0.1), None)
    tokens_by_hash: dict[str, list[tuple[int, ...]]] = {}
    for adapter in adapters:
        fresh = create_sampler("vllm", None, config)
        fresh.use_adapter(adapter)
        tokens = [c.token_ids for c in fresh.sample(requests[:8], SAMPLING)]
        assert tokens_by_hash.setdefault(fresh.hash, tokens) == tokens
    assert len({str(tokens) for tokens in tokens_by_hash.values()}) == 3


def test_many_long_prompts_do_not_hang_the_engine(sampler, requests: list[Request]) -> None:
    """The prompts together have more tokens than the engine processes in one step."""
    # The first token differs, so that no prompt has a cached prefix.
    long = [Request(f"l{i}", 0, (20 + i, *requests[0].prompt_ids * 40)[:440], i) for i in range(64)]
    completions = sampler.sample(long, SamplingConfig(max_tokens=4))
    assert len(completions) == 64
    with pytest.raises(ModelError, match=r"of p has 500 tokens, but the engine accepts .*prompt_tokens"):
        sampler.sample([Request("p", 0, tuple([5] * 500), 1)], SAMPLING)


@pytest.mark.nightly
def test_a_killed_engine_is_restarted_with_the_same_weights(sampler, policy: Policy, requests: list[Request]) -> None:
    sampler.use_adapter(random_adapter(policy))
    before = sampler.sample(requests, SAMPLING)
    restarts = sampler.restarts
    sampler._engine().process.kill()
    assert [c.token_ids for c in sampler.sample(requests, SAMPLING)] == [c.token_ids for c in before]
    assert sampler.restarts <= restarts + 1
    sampler.use_adapter(None)


@pytest.mark.nightly
def test_an_interrupted_call_leaves_no_result_behind(sampler, requests: list[Request]) -> None:
    """The call after an interrupted one gets its own result, from a new engine."""
    sampler.use_adapter(None)
    before = sampler.sample(requests[:2], SAMPLING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sampler._engine().connection), "poll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(requests, SAMPLING)
    assert [c.token_ids for c in sampler.sample(requests[:2], SAMPLING)] == [c.token_ids for c in before]


@pytest.mark.nightly
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_an_engine_over_two_devices_starts_and_ends_with_its_workers(
    config: RunConfig, sampler, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensor_parallel = 2, whose workers are children of the engine; on a CPU, each is bound to a core by hand."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    vllm = config.rollout.vllm.model_copy(update={"tensor_parallel": 2})
    rollout = config.rollout.model_copy(update={"vllm": vllm})
    settings = engine_settings(config.model_copy(update={"rollout": rollout}), cuda=False)
    engine = VllmProcess(settings)
    workers = psutil.Process(engine.process.pid).children(recursive=True)
    assert len([w for w in workers if "Worker_TP" in w.name()]) == 2
    sampling = [request_settings(r, SamplingConfig(max_tokens=8, temperature=0), sampler.stops) for r in requests[:2]]
    sampled = dict(engine.stream("sample", ([r.prompt_ids for r in requests[:2]], sampling), 60))
    engine.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [w for w in alive if w.status() != psutil.STATUS_ZOMBIE]
    sampler.use_adapter(None)
    expected = sampler.sample(requests[:2], SamplingConfig(max_tokens=8, temperature=0))
    assert [sampled[i][0] for i in (0, 1)] == [c.token_ids for c in expected]


def test_two_rounds_end_to_end(config: RunConfig, sampler) -> None:
    """All stages with vLLM: each round samples from the adapter that the previous round trained."""
    process = sampler._engine().process.pid
    run = carry_out(config, ahead=True)
    assert sampler._engine().process.pid == process  # one engine, from the first evaluation to the last
    for round_ in (1, 2):
        manifest = run.records.manifest("trajectories", round_)
        assert manifest
        assert manifest.metrics["seconds_beside"] > 0  # the engine had its requests beside those of the evaluation
        assert manifest.metrics["engine"] == "vllm"
        assert set(run.records.read("trajectories", round_)["policy"].to_pylist()) == {run.policy_hash(round_ - 1)}
    assert run.policy_hash(1) != run.policy_hash(2)
    assert STAGES["sample"](Run(config), 2).reused
    fresh, prompter = create_sampler("vllm", None, config), run.prompter(sampler.tokenizer)
    fresh.use_adapter(run.load_adapter(2))
    check_probe(run, fresh, prompter, 2)
    fresh.use_adapter(random_adapter(Policy(config.model, config.adapter)))
    with pytest.raises(StoreError, match="the engine has other weights than round 2 ended with"):
        check_probe(run, fresh, prompter, 2)


@pytest.mark.parametrize("one_queue", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_an_engine_killed_in_a_stage_loses_only_what_it_had_not_finished(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_queue: bool
) -> None:
    """The engine dies within the stage: the result equals that of an undisturbed one, and the notice reports it."""
    vllm = config.rollout.vllm.model_copy(update={"one_queue": one_queue})
    rollout = config.rollout.model_copy(update={"vllm": vllm})
    roots = [str(tmp_path / name) for name in ("undisturbed", "killed")]
    runs = [Run(config.model_copy(update={"root": root, "rollout": rollout})) for root in roots]
    for run in runs:
        run.records.open(run.config)
        STAGES["prepare"](run, 0)
    undisturbed = STAGES["sample"](runs[0], 1)
    original_stream, asked, received = VllmProcess.stream, [], []

    def stream(self: VllmProcess, command: str, payload: Any, seconds: float) -> Iterator[Any]:
        asked.append(len(payload[0]))
        for result in original_stream(self, command, payload, seconds):
            received.append(result)
            if len(asked) > 1 and len(received) == asked[0] + config.rollout.batch_size + 4:  # after the probe
                os.kill(self.process.pid, signal.SIGSTOP)  # so that it cannot finish the shard before it dies
                threading.Timer(0.1, self.process.kill).start()
            yield result

    monkeypatch.setattr(VllmProcess, "stream", stream)
    killed = STAGES["sample"](runs[1], 1)
    assert "engine restarts: 1;" in killed.notice
    assert undisturbed.notice == ""
    rollouts, size = killed.rows, config.rollout.batch_size
    if one_queue:
        assert asked[1] == rollouts
        assert asked[2] < rollouts - size  # one shard and a part of the next ones were finished
        tokens = [r.records.read("trajectories", 1, ["token_ids"]).to_pylist() for r in runs]
        assert tokens[0] == tokens[1]
    else:
        assert asked[1:4] == [size] * 3  # the first shard, and the second one twice
        assert runs[0].digest("trajectories", 1) == runs[1].digest("trajectories", 1)


def test_shards_are_sampled_as_one_queue(config: RunConfig, sampler, requests: list[Request]) -> None:
    """A short batch is complete before a long one that was asked for first."""
    sampler.use_adapter(None)
    long, short = SAMPLING.model_copy(update={"max_tokens": 40}), SAMPLING.model_copy(update={"max_tokens": 1})
    batches = [(requests[:3], long), (requests[3:5], short), (requests[5:8], long)]
    sampled = dict(results := list(sampler.sample_batches(batches)))
    assert results[0][0] == 1
    assert {i: [c.token_ids for c in sampled[i]] for i in sampled} == {
        i: [c.token_ids for c in sampler.sample(*batch)] for i, batch in enumerate(batches)
    }


@pytest.mark.nightly
def test_a_merged_export_in_vllm_equals_the_policy(config: RunConfig, requests: list[Request], tmp_path: Path) -> None:
    """The folder that `ogls export` writes, in a separate engine, equals base and adapter in transformers."""
    run = Run(config)
    export_model(run, 2, tmp_path / "merged")
    path = config.model.model_copy(update={"path": str(tmp_path / "merged")})
    merged = create_sampler("vllm", None, config.model_copy(update={"model": path}))
    merged.use_adapter(None)
    policy = run.load_policy(2)
    for request, completion in zip(requests[:8], merged.sample(requests[:8], SAMPLING), strict=True):
        expected = logprobs(policy, request, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a vLLM server on loopback that can load adapters."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(model), "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "32"),
        *("--max-model-len", "512", "--max-num-seqs", "32"),
    ]
    extra = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **extra}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
    while not responds(f"{url}/health"):
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(1)
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_samples_from_the_loaded_adapter(
    server: str, config: RunConfig, policy: Policy, requests: list[Request], tmp_path: Path
) -> None:
    server_config = config.rollout.server.model_copy(update={"url": server, "adapters": str(tmp_path)})
    rollout = config.rollout.model_copy(update={"engine": "server", "server": server_config})
    remote = create_sampler("server", None, config.model_copy(update={"rollout": rollout}))
    sampling = SamplingConfig(max_tokens=24)
    tokens_by_hash = {}
    for adapter in (None, random_adapter(policy), random_adapter(policy, 0.1), None):
        remote.use_adapter(adapter)
        policy.use_adapter(adapter)
        assert remote.hash == policy.hash
        completions = remote.sample(requests[:6], sampling)
        for request, completion in zip(requests, completions, strict=False):
            expected = logprobs(policy, request, completion.token_ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)
            assert (completion.token_ids[-1] in policy.stop_ids) == (completion.finish_reason == "stop")
        tokens = [c.token_ids for c in completions]
        assert tokens_by_hash.setdefault(remote.hash, tokens) == tokens  # the base is restored unchanged
    assert len({str(tokens) for tokens in tokens_by_hash.values()}) == 3
    policy.use_adapter(None)


@pytest.mark.nightly
def test_two_workers_on_ray_have_an_engine_each(config: RunConfig, tmp_path: Path) -> None:
    """Two rounds: each worker samples and evaluates from the adapter that the driver has trained."""
    settings = ("execution.workers=ray", "execution.address=local", "execution.worker_count=2", "model.device=cpu")
    sizes = ("execution.worker_devices=1", "rollout.batch_size=8", "evaluate.batch_size=16")
    two = small_config(tmp_path, "rollout.engine=vllm", f"model.path={config.model.path}", *settings, *sizes)
    try:
        run = carry_out(two, rounds=2, ahead=True)
    finally:
        end_workers()
    used: set[str] = set()
    for round_ in (1, 2):
        for table, policy in (("trajectories", round_ - 1), ("scores", round_)):
            manifest = run.records.manifest(table, round_)
            assert manifest
            used |= manifest.metrics["workers"].keys()  # of few shards, one worker may have all
            assert table == "scores" or manifest.metrics["seconds_beside"] > 0
            assert set(run.records.read(table, round_)["policy"].to_pylist()) == {run.policy_hash(policy)}
    assert len(used) == 2
