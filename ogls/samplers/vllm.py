"""Sampling with vLLM: one engine for a whole run; its weights are swapped in place.

On a CPU the adapter is merged into the weights, which the engine reloads (0.1 s for a small model). On a GPU the engine
gets a LoRA adapter under a new id, and the folder of the adapter before it is removed. Sleep mode releases GPU memory
for the teacher and training stages. If the engine dies, a new one starts and samples what was not finished.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from ogls.config import RunConfig, SamplingConfig
from ogls.errors import ModelError
from ogls.models.adapter import BASE, Adapter, adapter_files
from ogls.models.load import load_context_length, load_stop_ids, load_tokenizer, resolve_device
from ogls.models.merge import merged_weights, save_weights
from ogls.records import Completion, Request
from ogls.samplers.base import Batch, make_completion, sample_in_turn
from ogls.samplers.open_batches import OpenBatches, Output
from ogls.samplers.vllm_process import EngineDied, VllmProcess

T = TypeVar("T")

_ATTEMPTS = 3  # engines that may die in a row, before a batch is finished
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank
_engines: dict[str, VllmProcess] = {}  # the engine of this process, by its settings


class VllmSampler:
    """Samples from a vLLM engine (see `base.Sampler`)."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.tokenizer = load_tokenizer(config.model)
        self.stops = load_stop_ids(config.model, self.tokenizer)
        self.cuda = resolve_device(config.model).type == "cuda"
        self.settings = engine_settings(config, self.cuda)
        self.adapter: Adapter | None = None
        self.hash = BASE
        self.restarts = 0

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on, without a restart; None selects the base model."""
        self.adapter = adapter
        for _ in self._with_restarts(lambda: ()):
            pass

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        if not requests:
            return []
        ((_, completions),) = self.sample_batches([(requests, sampling)])
        return completions

    def sample_batches(self, batches: Sequence[Batch]) -> Generator[tuple[int, list[Completion]]]:
        """Yield each batch when its last request is finished.

        The engine has the requests of all batches at once, unless `rollout.vllm.one_queue` is off.

        If the engine dies, a new one samples the unfinished requests; without one queue, the whole batch.
        """
        vllm = self.config.rollout.vllm
        if len(batches) > 1 and not vllm.one_queue:
            yield from sample_in_turn(self, batches)
            return
        for requests, sampling in batches:
            self._check_lengths(requests, sampling)
        open_batches = OpenBatches([len(requests) for requests, _ in batches])
        asked = [(r.prompt_ids, request_settings(r, sampling, self.stops)) for rs, sampling in batches for r in rs]

        def sample_unfinished() -> Iterator[tuple[int, list[Output]]]:
            if not vllm.one_queue:
                open_batches.drop_outputs()
            numbers = open_batches.unfinished
            prompts, settings = ([asked[n][part] for n in numbers] for part in (0, 1))
            with closing(self._engine().stream("sample", (prompts, settings), vllm.stall_seconds)) as outputs:
                for position, output in outputs:
                    yield from open_batches.add(numbers[position], output)

        for index, outputs in self._with_restarts(sample_unfinished):
            yield index, self._completions(outputs)

    def _completions(self, outputs: Sequence[Output]) -> list[Completion]:
        texts = self.tokenizer.batch_decode([ids for ids, _ in outputs], skip_special_tokens=True)
        return [make_completion(*output, text, set(self.stops)) for output, text in zip(outputs, texts, strict=True)]

    def release_memory(self) -> None:
        """Put the engine to sleep, which releases GPU memory until the next call; does nothing on a CPU."""
        engine = _engines.get(_engine_key(self.settings))
        if self.cuda and engine and engine.alive():
            engine.call("sleep", None, self.config.rollout.vllm.stall_seconds)
            engine.asleep = True

    def _check_lengths(self, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        """Raise ModelError if a prompt and its completion do not fit the engine."""
        max_prompt = self.settings["engine"]["max_model_len"] - sampling.max_tokens
        longest = max(requests, key=lambda r: len(r.prompt_ids))
        if len(longest.prompt_ids) > max_prompt:
            raise ModelError(
                f"the prompt of {longest.problem_id} has {len(longest.prompt_ids)} tokens, but the engine accepts at "
                f"most {max_prompt}, plus {sampling.max_tokens} to sample; raise rollout.vllm.prompt_tokens"
            )

    def _with_restarts(self, work: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Yield what `work` yields with the right weights loaded; restart the engine if it dies.

        Raises EngineDied if that happens `_ATTEMPTS` times before `work` has yielded anything more.
        """
        attempt = 0
        while True:
            try:
                self._load_weights()
                for result in work():
                    attempt = 0
                    yield result
                return
            except EngineDied:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise
                self.restarts += 1

    def _engine(self) -> VllmProcess:
        """The running engine, awake; starts a new one if none runs. Engines with other settings are closed."""
        key = _engine_key(self.settings)
        for other in [k for k in _engines if k != key or not _engines[k].alive()]:
            _engines.pop(other).close()
        if key not in _engines:
            _empty_cache()  # vLLM measures the free memory when it starts
            _engines[key] = VllmProcess(self.settings)
        engine = _engines[key]
        if engine.asleep:
            _empty_cache()
            engine.call("wake", None, self.config.rollout.vllm.stall_seconds)
            engine.asleep = False
        return engine

    def _load_weights(self) -> None:
        """Load `self.adapter` into the engine, unless it is already loaded."""
        engine, limit = self._engine(), self.config.rollout.vllm.stall_seconds
        target = self.adapter.hash if self.adapter else BASE
        if engine.weights != target:
            engine.weights = ""
            engine.swaps += 1  # the LoRA id; counted per engine, because several samplers share it
            folder = Path(engine.folder.name) / f"{engine.swaps:05d}-{target}"
            folder.mkdir()
            lora = self.settings["engine"].get("enable_lora", False)
            if lora and self.adapter:
                for name, content in adapter_files(self.adapter, self.config.model, self.config.adapter).items():
                    (folder / name).write_bytes(content)
                engine.call("adapt", (engine.swaps, str(folder)), limit)
            elif lora:
                engine.call("adapt", None, limit)
            else:
                save_weights(merged_weights(self.config, self.adapter), folder)
                engine.call("reload", str(folder), limit)
                shutil.rmtree(folder)
            # vLLM reads the files of a LoRA adapter when it first samples from it, and never those of an earlier id.
            for earlier in Path(engine.folder.name).glob("[0-9]*-*"):
                if earlier != folder:
                    shutil.rmtree(earlier)
            engine.weights = target
        self.hash = target


def engine_settings(config: RunConfig, cuda: bool) -> dict[str, Any]:
    """The settings of an engine process. Samplers with equal settings share an engine."""
    vllm = config.rollout.vllm
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens) + vllm.prompt_tokens
    longest = min(longest, load_context_length(config.model))
    engine: dict[str, Any] = {
        "model": config.model.path,
        "revision": config.model.revision,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": longest,
        "max_num_seqs": vllm.max_sequences,
        "max_num_batched_tokens": max(vllm.batched_tokens, longest),
        "enable_prefix_caching": True,
        "enforce_eager": not cuda,
        "seed": 0,  # unused: every request has its own seed
        "disable_log_stats": True,
        "tensor_parallel_size": vllm.tensor_parallel,
    }
    if cuda:
        engine |= {"gpu_memory_utilization": vllm.gpu_memory, "enable_sleep_mode": True}
        if config.adapter.kind == "lora":
            engine |= {"enable_lora": True, "max_lora_rank": _max_rank(config), "max_loras": 1, "max_cpu_loras": 2}
    else:  # on a CPU, a seeded request fails if its prompt is prefilled in chunks
        engine["enable_chunked_prefill"] = False
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(vllm.cpu_cache_gib),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {"engine": {k: v for k, v in engine.items() if v is not None}, "environment": environment}


def _max_rank(config: RunConfig) -> int:
    """The smallest `max_lora_rank` of vLLM that takes the adapter. Raises ModelError if its rank is larger than all."""
    rank = config.adapter.rank
    if rank > _LORA_RANKS[-1]:
        raise ModelError(
            f"adapter.rank is {rank}, and vLLM takes LoRA adapters up to rank {_LORA_RANKS[-1]}: lower it (in a new "
            "run), or set rollout.engine = transformers"
        )
    return next(size for size in _LORA_RANKS if size >= rank)


def request_settings(request: Request, sampling: SamplingConfig, stops: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of vLLM's SamplingParams for one request."""
    return {
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(stops),
        "logprobs": 0,  # log-prob of the sampled token, before temperature and cuts
        "detokenize": False,
    }


def require_vllm() -> None:
    """Raise ModelError, with the command that installs it, if vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ModelError(
            "rollout.engine is vllm, which is not installed: pip install 'ogls-sd[vllm]' on a machine with CUDA, or "
            "`make vllm` (its CPU build); or set rollout.engine = transformers"
        )


def _engine_key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _empty_cache() -> None:
    """Give the GPU memory that torch caches back, for the process of the engine."""
    import torch

    gc.collect()  # a model that is not used any more may be part of a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
