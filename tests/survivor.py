"""A training that kills itself, as a process of its own: `attempt(ROOT, STAGE, ROUND, WHERE)`.

WHERE is `progress` (inside the stage's work, after something of it is done), `commit` (all of it written but the
manifest), or `memory` (it gets no more memory than it has when its model is loaded). STAGE `none` runs through.
To import torch and transformers takes many times as long as the run: one process does so and forks all others.
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


def attempt(root: Path | str, stage: str = "none", round_: int = 0, where: str = "progress") -> int:
    """The exit code of a training in a process with this one's environment: 0, 1 with the error shown, or -9."""
    with TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        order = {"what": [str(root), stage, round_, where], "environment": dict(os.environ), "errors": str(errors)}
        server = _server()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        if code == 1:
            print(errors.read_text(), file=sys.stderr)
        return code


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when its standard input does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    # Not a file to run: the verifier's workers would import it, and torch with it.
    command = [sys.executable, "-c", "import survivor; survivor.serve()"]
    return subprocess.Popen(
        command, env=environment, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    """Carry out the orders on standard input, each in a fork, and print its exit code."""
    for name in ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft"):
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_carry_out(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _carry_out(what: tuple[str, str, int, str], environment: dict[str, str], errors: str) -> int:
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    try:
        _arm(*what[1:])
        carry_out(small_config(what[0]))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _arm(stage: str, round_: int, where: str) -> None:
    """Have a stage of a round killed, or starved."""
    real_work, real_commit, real_score = stages.STAGES.get(stage), StageWriter.commit, teacher.score_rollouts
    if where == "progress" and real_work:
        stages.STAGES[stage] = lambda run, r: real_work(run, r, _die if r == round_ else lambda *_: None)
    elif where == "commit":
        StageWriter.commit = lambda self, name, metrics: (
            _die() if (name, self.round) == (stage, round_) else real_commit(self, name, metrics)
        )
    elif where == "memory":

        def starve(*arguments: Any, **others: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms,) * 2)
            ballast, size = [], 1 << 20
            while size >= 2048:  # what lies free in the process is used up as well
                try:
                    ballast.append(bytearray(size))
                except MemoryError:
                    size //= 2
            return real_score(*arguments, **others)

        teacher.score_rollouts = starve


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
