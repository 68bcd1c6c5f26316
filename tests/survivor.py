"""Train in a separate process with a fault in one stage: `attempt(root, stage, round_, fault)`.

Faults: `progress` kills the process in the work of the stage, at its first progress report; `commit` kills it when
everything but the manifest is written; `memory` limits its memory to what it has when its model is loaded. With the
stage `none` the training runs to its end.

Importing torch and transformers takes much longer than the training, so one process imports them and forks the others.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from conftest import REPO, carry_out, small_config

from ogls.distillation import teacher
from ogls.stages import registry as stages
from ogls.store.writer import StageWriter


def attempt(root: Path | str, stage: str = "none", round_: int = 0, fault: str = "progress") -> int:
    """Train in another process, with the environment of this one.

    Returns its exit code: 0; 1 after an error, which is printed; or -9 if it was killed.
    """
    with TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        job = {"arguments": [str(root), stage, round_, fault], "environment": dict(os.environ), "errors": str(errors)}
        server = _start_server()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        exit_code = int(server.stdout.readline())
        if exit_code == 1:
            print(errors.read_text(), file=sys.stderr)
        return exit_code


@cache
def _start_server() -> subprocess.Popen[str]:
    """Start the process that forks the trainings, once. It ends when its standard input is closed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    # With -c instead of a script: spawned workers of the verifier import the main script, and torch with it.
    command = [sys.executable, "-c", "import survivor; survivor.serve()"]
    return subprocess.Popen(
        command, env=environment, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    """Run every job that is read from standard input in a fork, and print its exit code."""
    for name in ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft"):
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_run_job(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_job(arguments: tuple[str, str, int, str], environment: dict[str, str], errors: str) -> int:
    """Train with standard output and error written to the file `errors`. Returns the exit code."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    try:
        _inject_fault(*arguments[1:])
        carry_out(small_config(arguments[0], "train.checkpoint_steps=1"))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _inject_fault(stage: str, round_: int, fault: str) -> None:
    """Patch the code so that the fault occurs in a stage of a round."""
    real_work, real_commit, real_score = stages.STAGES.get(stage), StageWriter.commit, teacher.score_rollouts
    if fault == "progress" and real_work:
        stages.STAGES[stage] = lambda run, r: real_work(run, r, _kill_self if r == round_ else lambda *_: None)
    elif fault == "commit":
        StageWriter.commit = lambda self, name, metrics: (
            _kill_self() if (name, self.round) == (stage, round_) else real_commit(self, name, metrics)
        )
    elif fault == "memory":

        def score_without_memory(*arguments: Any, **keywords: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms,) * 2)
            ballast, size = [], 1 << 20
            while size >= 2048:  # also use up the free memory within the limit
                try:
                    ballast.append(bytearray(size))
                except MemoryError:
                    size //= 2
            return real_score(*arguments, **keywords)

        teacher.score_rollouts = score_without_memory


def _kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
