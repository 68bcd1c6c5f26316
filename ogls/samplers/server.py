"""Sampling from a running `vllm serve`, by HTTP: rollouts may live on other machines.

The server is started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; a round's adapter is written where
it can read it (`rollout.server.adapters`) and loaded under a name that holds its hash, so that no old one is served.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ogls.config import RunConfig, SamplingConfig
from ogls.errors import EngineUnavailable, ModelError
from ogls.models.adapter import BASE, Adapter, adapter_files
from ogls.models.load import load_stop_ids, load_tokenizer
from ogls.records import Completion, Request
from ogls.samplers.base import make_completion
from ogls.samplers.vllm import request_settings

_ATTEMPTS, _WAIT_SECONDS = 5, 2.0  # at a server that does not answer: half a minute in all


class ServerSampler:
    """Samples from a vLLM server (see `rollout.Sampler`)."""

    restarts = 0

    def __init__(self, config: RunConfig):
        import httpx

        if config.adapter.kind != "lora":
            raise ModelError("rollout.engine = server swaps LoRA adapters: set adapter.kind = lora, or another engine")
        self.config, self.settings = config, config.rollout.server
        self.tokenizer = load_tokenizer(config.model)
        self.stops = load_stop_ids(config.model, self.tokenizer)
        self.client = httpx.Client(base_url=self.settings.url.rstrip("/"), timeout=self.settings.timeout_seconds)
        self.base = self._served()
        self.model, self.hash = self.base, BASE

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on; None stands for the base model."""
        name = f"ogls-{adapter.hash}" if adapter else self.base
        if adapter and name not in {m["id"] for m in self._ask("GET", "/v1/models")["data"]}:
            folder = Path(self.settings.adapters) / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in adapter_files(adapter, self.config.model, self.config.adapter).items():
                (folder / file).write_bytes(content)
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})
        if self.model not in (self.base, name):
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": self.model})
        self.model, self.hash = name, adapter.hash if adapter else BASE

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in their order; many are asked for at once."""
        with ThreadPoolExecutor(self.settings.at_once) as pool:
            found = list(pool.map(lambda r: self._complete(r, sampling), requests))
        texts = self.tokenizer.batch_decode([ids for ids, _ in found], skip_special_tokens=True)
        return [make_completion(*pair, text, set(self.stops)) for pair, text in zip(found, texts, strict=True)]

    def release_memory(self) -> None:
        """The server's memory is its own affair."""

    def _complete(self, request: Request, sampling: SamplingConfig) -> tuple[list[int], list[float]]:
        wanted = request_settings(request, sampling, self.stops)
        wanted.pop("detokenize")
        body = {"model": self.model, "prompt": list(request.prompt_ids), "return_token_ids": True, **wanted}
        (choice,) = self._ask("POST", "/v1/completions", body)["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def _served(self) -> str:
        """The name of the base model at the server. Raises ModelError if it serves another one."""
        served = [m for m in self._ask("GET", "/v1/models")["data"] if not m.get("parent")]
        for model in served:
            if self.config.model.path in (model["id"], model.get("root")):
                return str(model["id"])
        names = ", ".join(m["id"] for m in served) or "nothing"
        raise ModelError(f"the server at {self.settings.url} serves {names}, not {self.config.model.path}")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """An answer. Raises EngineUnavailable if the server does not give one, ModelError if it refuses."""
        import httpx

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code < 400:
                    return (
                        answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
                    )
                problem = f"{answer.status_code}: {answer.text[:300]}"
                if answer.status_code < 500:
                    raise ModelError(f"the server at {self.settings.url} refuses {path}: {problem}")
            if attempt < _ATTEMPTS:
                time.sleep(_WAIT_SECONDS * attempt)
        raise EngineUnavailable(
            f"the server at {self.settings.url} does not answer {path} ({problem}); start it, "
            "then give the same command again: what was finished is kept"
        )
