"""Sampling from a running `vllm serve` over HTTP, which may run on another machine.

Start the server with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. The adapter of a round is written to a
folder that the server reads (`rollout.server.adapters`) and loaded under a name with its hash, so that the server never
uses an old adapter. When the next one is loaded, the old one is unloaded and its folder is removed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from uuid import uuid4

from ogls.config import RunConfig, SamplingConfig
from ogls.errors import EngineUnavailable, ModelError
from ogls.models.adapter import BASE, Adapter, adapter_files
from ogls.models.load import load_stop_ids, load_tokenizer
from ogls.records import Completion, Request
from ogls.samplers.base import Batch, make_completion
from ogls.samplers.open_batches import OpenBatches, Output
from ogls.samplers.vllm import request_settings

_ATTEMPTS, _WAIT_SECONDS = 5, 2.0  # attempts at a request; 20 s of waiting between them in total


class ServerSampler:
    """Samples from a vLLM server (see `base.Sampler`)."""

    restarts = 0

    def __init__(self, config: RunConfig):
        import httpx

        if config.adapter.kind != "lora":
            raise ModelError("rollout.engine = server swaps LoRA adapters: set adapter.kind = lora, or another engine")
        self.config, self.settings = config, config.rollout.server
        self.tokenizer = load_tokenizer(config.model)
        self.stops = load_stop_ids(config.model, self.tokenizer)
        self.client = httpx.Client(base_url=self.settings.url.rstrip("/"), timeout=self.settings.timeout_seconds)
        self.base = self._find_base()
        self.model, self.hash = self.base, BASE

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on; None selects the base model."""
        name = f"ogls-{adapter.hash}" if adapter else self.base
        if adapter and not self._serves(name):
            folder = self._write_adapter(name, adapter)
            try:
                self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            except ModelError:
                if not self._serves(name):  # another worker of the run has loaded it in the meantime
                    raise
        if self.model not in (self.base, name):
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": self.model})
            shutil.rmtree(Path(self.settings.adapters) / self.model, ignore_errors=True)
        self.model, self.hash = name, adapter.hash if adapter else BASE

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in order; `rollout.server.at_once` is the number of concurrent requests."""
        if not requests:
            return []
        ((_, completions),) = self.sample_batches([(requests, sampling)])
        return completions

    def sample_batches(self, batches: Sequence[Batch]) -> Generator[tuple[int, list[Completion]]]:
        """Yield each batch when its last request is finished. The requests of all batches wait for the server."""
        open_batches = OpenBatches([len(requests) for requests, _ in batches])
        pool = ThreadPoolExecutor(self.settings.at_once)
        try:
            asked = [(request, sampling) for requests, sampling in batches for request in requests]
            numbers = {pool.submit(self._complete, *one): number for number, one in enumerate(asked)}
            for future in as_completed(numbers):
                for index, outputs in open_batches.add(numbers[future], future.result()):
                    texts = self.tokenizer.batch_decode([ids for ids, _ in outputs], skip_special_tokens=True)
                    stops = set(self.stops)
                    yield index, [make_completion(*o, text, stops) for o, text in zip(outputs, texts, strict=True)]
        finally:
            pool.shutdown(cancel_futures=True)

    def release_memory(self) -> None:
        """Does nothing: the memory of a remote server is not managed here."""

    def _serves(self, name: str) -> bool:
        """Whether the server has a model or an adapter of this name."""
        return name in {m["id"] for m in self._request("GET", "/v1/models")["data"]}

    def _write_adapter(self, name: str, adapter: Adapter) -> Path:
        """Write the files of an adapter, all at once: other workers of the run may do the same. Returns the folder."""
        folder = Path(self.settings.adapters).absolute() / name
        if not folder.exists():
            own = folder.with_name(f".{name}-{uuid4().hex}")
            own.mkdir(parents=True)
            for file, content in adapter_files(adapter, self.config.model, self.config.adapter).items():
                (own / file).write_bytes(content)
            try:
                own.rename(folder)
            except OSError:  # another worker was faster
                shutil.rmtree(own)
        return folder

    def _complete(self, request: Request, sampling: SamplingConfig) -> Output:
        settings = request_settings(request, sampling, self.stops)
        settings.pop("detokenize")
        body = {"model": self.model, "prompt": list(request.prompt_ids), "return_token_ids": True, **settings}
        (choice,) = self._request("POST", "/v1/completions", body)["choices"]
        return tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])

    def _find_base(self) -> str:
        """The name under which the server serves the base model. Raises ModelError if it serves another model."""
        served = [m for m in self._request("GET", "/v1/models")["data"] if not m.get("parent")]
        for model in served:
            if self.config.model.path in (model["id"], model.get("root")):
                return str(model["id"])
        names = ", ".join(m["id"] for m in served) or "nothing"
        raise ModelError(f"the server at {self.settings.url} serves {names}, not {self.config.model.path}")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON response.

        Raises EngineUnavailable if the server does not respond, ModelError if it refuses the request.
        """
        import httpx

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if response.status_code < 400:
                    return (
                        response.json()
                        if response.headers.get("content-type", "").startswith("application/json")
                        else {}
                    )
                failure = f"{response.status_code}: {response.text[:300]}"
                if response.status_code < 500:
                    raise ModelError(f"the server at {self.settings.url} refuses {path}: {failure}")
            if attempt < _ATTEMPTS:
                time.sleep(_WAIT_SECONDS * attempt)
        raise EngineUnavailable(
            f"the server at {self.settings.url} does not respond to {path} ({failure}); start it, "
            "then run the same command again: finished work is kept"
        )
