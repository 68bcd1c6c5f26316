"""Progress of a stage for people: a bar on a terminal, a line now and then elsewhere, an artifact in Prefect's UI."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.markup import escape

from ogls.records import StageResult
from tasks.artifacts import ArtifactProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

_LINE_SECONDS = 15.0  # how often a stage prints a line where there is no terminal

_console: Console | None = None


def show_progress_on(console: Console | None) -> None:
    """Show the progress of this process's stages on a console from now on; None shows it no longer."""
    global _console
    _console = console


def print_line(text: str) -> None:
    """Print a line on the console, if there is one."""
    if _console:
        _console.print(text, highlight=False, soft_wrap=True)


class TerminalProgress:
    """A progress callback that prints a line every 15 seconds, or moves a bar on a terminal."""

    def __init__(self, stage: str, round_: int):
        self.label = f"r{round_:03d} {stage}"
        self.started = self.last_line = time.monotonic()
        self.bar = _new_bar(_console) if _console is not None and _console.is_terminal else None
        if self.bar:
            self.bar.add_task(f"{self.label:<15}", total=None)

    def __call__(self, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            left = (now - self.started) / max(done, 1) * (total - done)
            print_line(f"  {self.label}: {done} of {total}, about {left:.0f} s left")


class StageProgress:
    """A progress callback that shows a stage on the terminal and in Prefect's UI."""

    def __init__(self, terminal: TerminalProgress, artifact: ArtifactProgress):
        self.terminal, self.artifact = terminal, artifact

    def __call__(self, done: int, total: int) -> None:
        self.terminal(done, total)
        self.artifact(done, total)

    def finish(self, result: StageResult) -> None:
        """Print the notice of the result, and complete the artifact."""
        if result.notice:
            print_line(f"  [yellow]{escape(result.notice)}[/yellow]")
        self.artifact.finish(result)


@contextmanager
def terminal_progress(stage: str, round_: int) -> Iterator[TerminalProgress]:
    """Progress of work outside Prefect, while the block runs."""
    progress = TerminalProgress(stage, round_)
    with progress.bar or nullcontext():
        yield progress


@contextmanager
def stage_progress(run: str, stage: str, round_: int) -> Iterator[StageProgress]:
    """Progress of a stage that runs as a Prefect task, while the block runs."""
    with terminal_progress(stage, round_) as terminal:
        yield StageProgress(terminal, ArtifactProgress(run, stage, round_))


def _new_bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    text = TextColumn("  {task.description}")
    return Bar(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
