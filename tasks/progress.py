"""Progress of a stage: a bar on a terminal, a line every 15 seconds elsewhere, and an artifact in the Prefect UI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ogls.progress import seconds_left
from ogls.records import StageResult
from tasks.artifacts import ArtifactProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

_LINE_SECONDS = 15.0  # time between two lines if the console is not a terminal

_console: Console | None = None
_end_wait: Callable[[], None] | None = None


def show_progress_on(console: Console | None, end_wait: Callable[[], None] | None = None) -> None:
    """Show the progress of the stages of this process on `console`; None turns it off.

    `end_wait` removes the sign of waiting that is on the console. It is called once, before the first line or bar.
    """
    global _console, _end_wait
    _console, _end_wait = console, end_wait


def _take_console() -> Console | None:
    """The console, without a sign of waiting on it."""
    global _end_wait
    if _end_wait:
        _end_wait()
        _end_wait = None
    return _console


def print_line(text: str) -> None:
    """Print a line, which may have Rich markup, on the console; do nothing without a console."""
    if console := _take_console():
        console.print(text, highlight=False, soft_wrap=True)


class TerminalProgress:
    """A progress callback that moves a bar on a terminal, or prints a line every 15 seconds."""

    def __init__(self, stage: str, round_: int):
        self.label = f"r{round_:03d} {stage}"
        self.started = self.last_line = time.monotonic()
        console = _take_console()
        self.bar = _new_bar(console) if console is not None and console.is_terminal else None
        if self.bar:
            self.bar.add_task(f"{self.label:<15}", total=None)

    def __call__(self, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            left = seconds_left(done, total, now - self.started)
            print_line(
                f"  {self.label}: {done} of {total}" + (f", about {left:.0f} s left" if left is not None else "")
            )


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
    """Context manager that yields a progress callback for work outside Prefect."""
    progress = TerminalProgress(stage, round_)
    with progress.bar or nullcontext():
        yield progress


@contextmanager
def stage_progress(run: str, stage: str, round_: int) -> Iterator[StageProgress]:
    """Context manager that yields a progress callback for a stage that runs as a Prefect task."""
    with terminal_progress(stage, round_) as terminal:
        yield StageProgress(terminal, ArtifactProgress(run, stage, round_))


def _new_bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            left = seconds_left(int(task.completed), int(task.total or 0), task.elapsed or 0.0)
            return Text("" if left is None else f"{left // 60:.0f}:{left % 60:02.0f} left", style="progress.remaining")

    text = TextColumn("  {task.description}")
    return Bar(text, BarColumn(), MofNCompleteColumn(), TimeLeft(), console=console, transient=True)
