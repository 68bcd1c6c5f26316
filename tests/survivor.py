"""A training that kills itself: `python survivor.py ROOT STAGE ROUND WHERE`, run by test_survival.

WHERE is `progress` (inside the stage's work, after something of it is done), `commit` (all of it written but the
manifest), or `memory` (it gets no more memory than it has when its model is loaded). STAGE `none` runs through.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import psutil
from conftest import carry_out, small_config

from ogls import stages, teacher
from ogls.writer import StageWriter


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, stage, round_, where = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    real_work = stages.STAGES.get(stage)
    real_commit = StageWriter.commit
    if where == "progress" and real_work:
        stages.STAGES[stage] = lambda run, r: real_work(run, r, die if r == round_ else lambda *_: None)
    elif where == "memory":
        real_score = teacher.score

        def starve(*arguments: object, **others: object) -> object:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms,) * 2)
            ballast, size = [], 1 << 20
            while size >= 2048:  # what lies free in the process is used up as well
                try:
                    ballast.append(bytearray(size))
                except MemoryError:
                    size //= 2
            return real_score(*arguments, **others)

        teacher.score = starve
    elif where == "commit":
        StageWriter.commit = lambda self, name, metrics: (
            die() if (name, self.round) == (stage, round_) else real_commit(self, name, metrics)
        )
    carry_out(small_config(root))
