"""vLLM in a separate process that can be killed: the code of that process, and the parent's handle.

Two concurrent calls on one engine can spin forever, an engine that raised once is not reliable, and a hanging engine
ignores SIGTERM. So the engine handles one call at a time, each result has a time limit, and any failure ends the
process.

With tensor parallelism an engine has child processes, so its process is no daemon. It leads a process group, which is
killed as a whole: by the parent, or by a thread of its own once the parent has ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

_START_SECONDS = 900.0  # it loads gigabytes of weights, and the first start compiles
_LOG_TAIL = 2000  # characters of the engine's log that an error shows


class EngineDied(Exception):
    """The engine process died, raised or timed out. Finished batches are kept; a new engine can start."""


class VllmProcess:
    """An engine process. A call that does not return raises EngineDied, and the process is killed."""

    weights = "base"  # hash of the weights in use
    asleep = False  # whether GPU memory is released
    swaps = 0  # how many times weights were loaded
    _streaming = False  # whether results of a stream are left

    def __init__(self, settings: dict[str, Any]):
        from multiprocessing import get_context

        self.folder = tempfile.TemporaryDirectory(prefix="ogls-vllm-")
        self.log = Path(self.folder.name) / "engine.log"
        context = get_context("spawn")
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, settings, self.folder.name), daemon=False)
        self.process.start()
        child_end.close()  # so that the end of the process closes the pipe
        self._finalizer = Finalize(self, _kill, args=(self.process, self.folder), exitpriority=100)
        self._receive("start", _START_SECONDS)

    def call(self, command: str, payload: Any, seconds: float) -> Any:
        """Run a command in the engine and return its result, with a time limit in seconds."""
        self._send(command, payload)
        return self._receive(command, seconds)[1]

    def stream(self, command: str, payload: Any, seconds: float) -> Generator[Any]:
        """Run a command in the engine and yield its results one by one; each has the time limit in seconds.

        If the caller stops before the last result, the engine process is killed: the others would reach the next call.
        """
        self._send(command, payload)
        self._streaming = True
        try:
            while (message := self._receive(command, seconds))[0] == "part":
                yield message[1]
            self._streaming = False
        except GeneratorExit:
            self.close()
            raise

    def alive(self) -> bool:
        """Whether the process runs and was not closed."""
        return bool(self._finalizer.still_active() and self.process.is_alive())

    def close(self) -> None:
        """End the process if it still runs."""
        self._finalizer()

    def _send(self, command: str, payload: Any) -> None:
        if self._streaming:
            self._fail(f"cannot receive {command}: the results of an earlier command were not taken")
        try:
            self.connection.send((command, payload))
        except OSError:
            self._fail(f"cannot receive {command}: its pipe is closed")

    def _receive(self, command: str, seconds: float) -> tuple[str, Any]:
        """A message of the engine: its kind and its value. An interrupted wait also ends the process."""
        try:
            return self._wait_for_message(command, seconds)
        except EngineDied:
            raise
        except BaseException:
            # Interrupted by the time limit of a task or Ctrl-C: the next call would receive the result of this call.
            self.close()
            raise

    def _wait_for_message(self, command: str, seconds: float) -> tuple[str, Any]:
        """The next message: ("part", a result of several) or ("done", the result).

        Raises EngineDied if the process ends, fails or exceeds `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not self.connection.poll(0.2):
            if not self.process.is_alive():
                self._fail(f"ended with code {self.process.exitcode} in {command}")
            if time.monotonic() > deadline:
                self._fail(f"did not respond to {command} within {seconds:.0f} s")
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._fail(f"ended in {command}")
        if kind == "failed":
            self._fail(f"failed in {command}: {value}")
        return kind, value

    def _fail(self, reason: str) -> None:
        """Kill the process and raise EngineDied with the end of its log."""
        log_tail = self.log.read_text(errors="replace")[-_LOG_TAIL:].strip() if self.log.exists() else ""
        self.close()
        raise EngineDied(f"the vLLM engine {reason}" + (f"; its log ends with:\n{log_tail}" if log_tail else ""))


def _kill(process: Any, folder: Any) -> None:
    with suppress(ProcessLookupError):  # it has ended with all its children, or does not lead a group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)
    folder.cleanup()


# --- code of the engine process -------------------------------------------------------------------


def _serve(connection: Any, settings: dict[str, Any], folder: str) -> None:
    """Handle commands until the parent ends or a command fails."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    log_file = os.open(Path(folder) / "engine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    for name, value in settings["environment"].items():
        os.environ.setdefault(name, value)
    try:
        engine = _Engine(settings["engine"])
        connection.send(("done", None))
        while True:
            command, payload = connection.recv()
            result = getattr(engine, command)(payload)
            if isinstance(result, Iterator):
                for part in result:
                    connection.send(("part", part))
                result = None
            connection.send(("done", result))
    except EOFError:
        return  # the parent exited
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {str(error)[:1000]}"))
        raise


def _end_with_parent(folder: str) -> None:
    """Wait until the parent has ended, in whatever way; then kill this process and its children."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


class _Engine:
    """The commands that the parent can send."""

    def __init__(self, arguments: dict[str, Any]):
        from vllm import LLM

        self.llm = LLM(**arguments)
        self.lora: Any = None

    def reload(self, folder: str) -> None:
        """Replace the weights by those in a folder, and drop cached prefixes, which belong to the old weights."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_prefix_cache()
        self.lora = None

    def adapt(self, payload: tuple[int, str] | None) -> None:
        """Use a LoRA adapter; None selects the base model.

        Every adapter gets a new id, because vLLM serves the old adapter under an old id.
        """
        from vllm.lora.request import LoRARequest

        self.lora = LoRARequest(f"round-{payload[0]}", payload[0], payload[1]) if payload else None

    def sample(
        self, payload: tuple[Sequence[Sequence[int]], Sequence[dict[str, Any]]]
    ) -> Iterator[tuple[int, tuple[tuple[int, ...], tuple[float, ...]]]]:
        """Yield (index of the prompt, (token ids, log-probs)) of each completion as soon as it is finished."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for index, (prompt, settings) in enumerate(zip(*payload, strict=True)):
            params = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params, lora_request=self.lora)
        while engine.has_unfinished_requests():
            for result in engine.step():
                if result.finished:
                    (output,) = result.outputs
                    yield int(result.request_id), (tuple(output.token_ids), _logprobs(output))

    def sleep(self, _: None) -> None:
        """Release GPU memory: move the weights to host memory and drop the cache."""
        self.llm.sleep(level=1)

    def wake(self, _: None) -> None:
        """Move the weights back to the GPU after `sleep`."""
        self.llm.wake_up()


def _logprobs(output: Any) -> tuple[float, ...]:
    return tuple(step[i].logprob for i, step in zip(output.token_ids, output.logprobs, strict=True))
