"""What the parts of `measure.py` share: sizes, the model, the rows of results, and limits of time."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measured import device_name, median_seconds, peak_bytes, peak_flops, write_results
from randommodel import QWEN3_1_7B, random_model

GIB = 2**30
LORA_RANK = 32


@dataclass(frozen=True)
class Step:
    """A training step to time: rollouts of one length, and the settings of train that differ from the defaults."""

    name: str
    rollouts: int
    tokens: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much the parts compute."""

    shape: dict[str, int]
    teacher: tuple[tuple[int, int, int], ...]  # (rollouts of a group, tokens of each, tokens of a context)
    teacher_batch: int  # teacher.batch_tokens
    steps: tuple[Step, ...]
    prompt: int  # tokens of a prompt
    steered: int  # tokens that are steered
    sampled: tuple[int, ...]  # completions that are decoded together
    new_tokens: int  # tokens of each
    repeats: int = 3


CHECKPOINTED = {"gradient_checkpointing": True}
QWEN = Sizes(
    shape=QWEN3_1_7B,
    teacher=((8, 1024, 2048), (4, 1024, 8192)),
    teacher_batch=32768,
    steps=(
        Step("32 rollouts of 1,024", 32, 1024, {}),
        Step("32 rollouts of 1,024, checkpointing", 32, 1024, CHECKPOINTED),
        Step("8 rollouts of 3,840, checkpointing", 8, 3840, CHECKPOINTED),
        Step("32 rollouts of 1,024, checkpointing, full vocabulary", 32, 1024, {**CHECKPOINTED, "support": "full"}),
        Step("2 rollouts of 16,128, checkpointing", 2, 16128, CHECKPOINTED),
    ),
    prompt=256,
    steered=4096,
    sampled=(64, 128),
    new_tokens=96,
)
TINY_SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 4608}
SMALL = Sizes(
    shape=TINY_SHAPE,
    teacher=((3, 16, 32),),
    teacher_batch=128,
    steps=tuple(Step(s.name, 3, 12, s.settings) for s in (QWEN.steps[0], QWEN.steps[3])),
    prompt=8,
    steered=48,
    sampled=(2, 4),
    new_tokens=6,
    repeats=1,
)


@dataclass
class Bench:
    """The device, the sizes, and a random model with LoRA that is loaded once, on first use."""

    device: str
    sizes: Sizes
    folder: Path

    @cached_property
    def model(self) -> Path:
        """A random model of the measured shape, bfloat16."""
        path = random_model(self.folder / "model", "bfloat16", self.device, **self.sizes.shape)
        free_memory()
        return path

    @cached_property
    def policy(self) -> Any:
        """The model with an untrained adapter."""
        from ogls.models.policy import Policy

        config = self.config()
        return Policy(config.model, config.adapter)

    @cached_property
    def shape(self) -> Any:
        """The dimensions of the model."""
        from ogls.models.shape import read_shape

        return read_shape(self.config())

    def config(self, **sections: Any) -> Any:
        """A configuration for the model, with further settings by section."""
        from ogls.config import build_config

        model = {"path": str(self.model), "dtype": "bfloat16", "device": self.device}
        data = {"model": model, "adapter": {"rank": LORA_RANK, "alpha": LORA_RANK}, "evaluate": {"benchmarks": [{}]}}
        return build_config(data | sections)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"


@dataclass
class Results:
    """The rows of both tables, which are written after every part."""

    out: Path
    facts: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)

    def check(self, part: str, name: str, error: float, limit: float, note: str = "") -> None:
        """Record an error, which has to be at most `limit`; nan is not."""
        self._record(part, name, bool(error <= limit), float(error), limit, note)

    def require(self, part: str, name: str, holds: bool, note: str = "") -> None:
        """Record what has to hold."""
        self._record(part, name, holds, None, None, note)

    def _record(self, part: str, name: str, passed: bool, error: float | None, limit: float | None, note: str) -> None:
        row = {"part": part, "check": name, "error": error, "limit": limit, "passed": passed, "note": note}
        self.checks.append({**row, **self.facts})
        numbers = "" if error is None else f": {error:.3g}, limit {limit:.3g}"
        print(f"  {'ok' if passed else 'FAILED'} {name}{numbers} {note}", flush=True)

    def speed(self, part: str, case: str, **measured: Any) -> None:
        """Record a measurement; what is not given is empty."""
        empty = dict.fromkeys(SPEED_COLUMNS.keys() - {"part", "case", "note"})
        row = {"part": part, "case": case, **empty, "note": "", **measured}
        seconds, peak, planned = row["seconds"], row["peak_gib"], row["planned_gib"]
        if seconds and row["tokens"]:
            row["rate"] = row["tokens"] / seconds
        if peak and planned:
            row["plan_ratio"] = planned / peak
        self.speeds.append({**row, **self.facts})
        shown = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
        print(f"  {case}: {', '.join(shown)} {row['note']}", flush=True)

    def time(
        self,
        part: str,
        case: str,
        call: Any,
        repeats: int,
        flop: float = 0,
        is_16_bit: bool = True,
        warm: bool = False,
        **known: Any,
    ) -> None:
        """Record the seconds and the peak memory of a call; or that it does not fit.

        With its operations `flop`, the rate too, and for 16-bit products its share of the peak of a known GPU. `warm`
        says that an equal call has been made: otherwise a first one allocates buffers and tunes kernels.
        """
        try:
            if not warm:
                call()
            seconds = median_seconds(call, repeats)
            peak = peak_bytes(call) / GIB
        except torch.OutOfMemoryError:
            self.speed(part, case, note="does not fit into memory", **known)
            return
        finally:
            free_memory()
        best = peak_flops(self.facts["device"]) if is_16_bit else None
        rates = {"tflops": flop / seconds / 1e12, "mfu": flop / seconds / best if best else None} if flop else {}
        self.speed(part, case, seconds=seconds, peak_gib=peak, **rates, **known)

    def write(self) -> None:
        """Write both tables, as Parquet and Markdown."""
        if self.checks:
            write_results(self.out, "gpu-checks", self.checks, CHECK_COLUMNS, show=False)
        if self.speeds:
            write_results(self.out, "gpu-speed", self.speeds, SPEED_COLUMNS, show=False)


CHECK_COLUMNS = {
    "part": ("part", ""),
    "check": ("check", ""),
    "error": ("error", ".2g"),
    "limit": ("limit", ".2g"),
    "passed": ("passed", ""),
    "note": ("note", ""),
    "device": ("device", ""),
}
SPEED_COLUMNS = {
    "part": ("part", ""),
    "case": ("case", ""),
    "tokens": ("tokens", ",d"),
    "seconds": ("seconds", ".3f"),
    "rate": ("tokens/s", ",.0f"),
    "tflops": ("TFLOP/s", ".1f"),
    "mfu": ("MFU", ".3f"),
    "peak_gib": ("peak GiB beyond the model", ".2f"),
    "planned_gib": ("planned", ".2f"),
    "plan_ratio": ("planned / peak", ".2f"),
    "kl_mean": ("mean KL to fp32, nats", ".1e"),
    "kl_max": ("largest", ".1e"),
    "note": ("note", ""),
    "device": ("device", ""),
}


class OutOfTime(Exception):
    """A part has used its time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`, as soon as it is back in Python."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def free_memory() -> None:
    """Give unused memory back to the GPU."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine_facts() -> dict[str, str]:
    """The device, its driver and the versions of the libraries, for every row."""
    import transformers

    driver = ""
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
            driver = done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return {"device": device_name(), "driver": driver, "cuda": torch.version.cuda or "", **versions}


@contextmanager
def temporary_bench(device: str, sizes: Sizes) -> Iterator[Bench]:
    """A bench whose files are removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Bench(device, sizes, Path(folder))
