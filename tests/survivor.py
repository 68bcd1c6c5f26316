"""A training that kills itself: `python survivor.py ROOT STAGE ROUND WHERE`, run by test_survival.

WHERE is `progress` (inside the stage's work, after something of it is done) or `commit` (all of it written
but the manifest). STAGE `none` runs through.
"""

from __future__ import annotations

import os
import signal
import sys

from conftest import carry_out, small_config

from ogls import stages
from ogls.writer import StageWriter


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, stage, round_, where = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    real_work = stages.STAGES.get(stage)
    real_commit = StageWriter.commit
    if where == "progress" and real_work:
        stages.STAGES[stage] = lambda run, r: real_work(run, r, die if r == round_ else lambda *_: None)
    elif where == "commit":
        StageWriter.commit = lambda self, name, metrics: (
            die() if (name, self.round) == (stage, round_) else real_commit(self, name, metrics)
        )
    carry_out(small_config(root))
