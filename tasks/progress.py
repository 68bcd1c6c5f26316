"""Progress for whoever watches in the foreground: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from ogls.records import StageResult

if TYPE_CHECKING:
    from rich.console import Console

_LINE_SECONDS = 15.0  # how often a stage speaks where there is no terminal

_watching: Console | None = None


def watch(console: Console | None) -> None:
    """Show the progress of this process's stages on a console from now on (None: no longer)."""
    global _watching
    _watching = console


def say(text: str) -> None:
    """A line for whoever watches."""
    if _watching:
        _watching.print(text, highlight=False, soft_wrap=True)


class Reporter:
    """What a stage calls with (done, total)."""

    def __init__(self, stage: str, round_: int):
        self.name = f"r{round_:03d} {stage}"
        self.began = self.spoke = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.spoke >= _LINE_SECONDS:
            self.spoke = now
            left = (now - self.began) / max(done, 1) * (total - done)
            say(f"  {self.name}: {done} of {total}, about {left:.0f} s left")

    def finished(self, result: StageResult) -> None:
        if result.notice:
            say(f"  [yellow]{escape(result.notice)}[/yellow]")


class BarReporter(Reporter):
    """The same on a terminal."""

    def __init__(self, stage: str, round_: int, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(stage, round_)
        text = TextColumn("  {task.description}")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(f"{self.name:<15}", total=None)

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)


@contextmanager
def reporting(stage: str, round_: int) -> Iterator[Reporter]:
    """A reporter for one stage."""
    if _watching is not None and _watching.is_terminal:
        reporter = BarReporter(stage, round_, _watching)
        with reporter.bar:
            yield reporter
    else:
        yield Reporter(stage, round_)
