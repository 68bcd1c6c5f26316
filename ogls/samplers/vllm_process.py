"""vLLM in a process of its own, which can be killed: what runs there, and the parent's handle on it.

Two calls at once on one engine can spin for ever, an engine that has raised is not to be trusted again, and a hang
ignores SIGTERM. So there is one call at a time, every one has a limit, and whatever goes wrong ends the process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

_START_SECONDS = 900.0  # loading some GB of weights, and the first run ever compiles
_TAIL = 2000  # last characters of the engine's log in an error


class EngineDied(Exception):
    """The engine's process has died, raised or gone silent. What it had finished is there; a new one may start."""


class VllmProcess:
    """An engine process. Raises EngineDied from any call that does not come back, and the process is gone then."""

    weights = "base"  # hash of the weights in use
    asleep = False
    swaps = 0  # times that the weights were exchanged

    def __init__(self, settings: dict[str, Any]):
        from multiprocessing import get_context

        self.folder = tempfile.TemporaryDirectory(prefix="ogls-vllm-")
        self.log = Path(self.folder.name) / "engine.log"
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed
        self.closing = Finalize(self, _kill, args=(self.process, self.folder), exitpriority=100)
        self._answer("start", _START_SECONDS)

    def call(self, command: str, payload: Any, seconds: float) -> Any:
        """Have the engine carry out a command within a wall limit."""
        try:
            self.connection.send((command, payload))
        except OSError:
            self._gone(f"cannot be reached for {command}")
        return self._answer(command, seconds)

    def alive(self) -> bool:
        return bool(self.closing.still_active() and self.process.is_alive())

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.closing()

    def _answer(self, command: str, seconds: float) -> Any:
        try:
            return self._waited_for(command, seconds)
        except EngineDied:
            raise
        except (
            BaseException
        ):  # interrupted, by a task's time limit or Ctrl-C: the next call would get this one's answer
            self.close()
            raise

    def _waited_for(self, command: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self.connection.poll(0.2):
            if not self.process.is_alive():
                self._gone(f"ended with code {self.process.exitcode} in {command}")
            if time.monotonic() > deadline:
                self._gone(f"gave no answer to {command} for {seconds:.0f} s")
        try:
            state, value = self.connection.recv()
        except (EOFError, OSError):
            self._gone(f"ended in {command}")
        if state == "failed":
            self._gone(f"failed in {command}: {value}")
        return value

    def _gone(self, what: str) -> None:
        said = self.log.read_text(errors="replace")[-_TAIL:].strip() if self.log.exists() else ""
        self.close()
        raise EngineDied(f"the vLLM engine {what}" + (f"; its log ends with:\n{said}" if said else ""))


def _kill(process: Any, folder: Any) -> None:
    process.kill()
    process.join(10)
    folder.cleanup()


# --- in the engine's process ----------------------------------------------------------------------


def _serve(connection: Any, settings: dict[str, Any], log: str) -> None:
    """Answer commands until the parent is gone, or something fails."""
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    for name, value in settings["environment"].items():
        os.environ.setdefault(name, value)
    try:
        engine = _Engine(settings["engine"])
        connection.send(("done", None))
        while True:
            command, payload = connection.recv()
            connection.send(("done", getattr(engine, command)(payload)))
    except EOFError:
        return  # the parent has gone
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {str(error)[:1000]}"))
        raise


class _Engine:
    """The commands."""

    def __init__(self, arguments: dict[str, Any]):
        from vllm import LLM

        self.llm = LLM(**arguments)
        self.lora: Any = None

    def reload(self, folder: str) -> None:
        """Take the weights of a folder in place of those in use. Cached prefixes are of the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_prefix_cache()
        self.lora = None

    def adapt(self, payload: tuple[int, str] | None) -> None:
        """Use a LoRA adapter, under a number that no other had: vLLM would serve that one. None: the base model."""
        from vllm.lora.request import LoRARequest

        self.lora = LoRARequest(f"round-{payload[0]}", payload[0], payload[1]) if payload else None

    def sample(self, payload: tuple[Sequence[Sequence[int]], Sequence[dict[str, Any]]]) -> list[tuple[Any, ...]]:
        """(token ids, log-probs, finish reason) of a completion a prompt."""
        from vllm import SamplingParams

        prompts, sampling = payload
        found = self.llm.generate(
            [{"prompt_token_ids": list(p)} for p in prompts],
            [SamplingParams(**s) for s in sampling],
            lora_request=self.lora,
            use_tqdm=False,
        )
        outputs = [f.outputs[0] for f in found]
        return [(tuple(o.token_ids), _logprobs(o), o.finish_reason) for o in outputs]

    def sleep(self, _: None) -> None:
        """Give the memory back: weights go to the host's, the cache is dropped."""
        self.llm.sleep(level=1)

    def wake(self, _: None) -> None:
        self.llm.wake_up()


def _logprobs(output: Any) -> tuple[float, ...]:
    return tuple(step[i].logprob for i, step in zip(output.token_ids, output.logprobs, strict=True))
