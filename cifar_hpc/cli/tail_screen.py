"""submit.py --follow on a terminal: the log, and below it a progress bar of the epoch, or the state of the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cifar_hpc.cli.terminal import kind_of_line, style_of_line
from cifar_hpc.runs.state import RunState
from cifar_hpc.text import duration

LEAST_BAR, MOST_BAR = 8, 40
_PROGRESS = re.compile(
    r"[-0-9]{10} [:0-9]{8} epoch (\d{1,9})/(\d{1,9}) step (\d{1,9})/(\d{1,9}) \(total \d+\)  loss (\S+)  acc (\S+)%  "
    r"lr \S+  (\S{1,30}) img/s  run ETA (?:(\d{1,9}) days?, )?(\d{1,2}):(\d\d):(\d\d)$"
)


@dataclass(frozen=True)
class Progress:
    """A line of progress: step of `steps` in epoch of `epochs`; as text what is shown as it is."""

    epoch: str
    epochs: str
    step: int
    steps: int
    loss: str
    accuracy: str
    images_per_second: str
    eta_seconds: float


def parse_progress(line: str) -> Progress | None:
    """The progress in a line of train.log; None for any other line."""
    found = _PROGRESS.match(line)
    if found is None:
        return None
    epoch, epochs, step, steps, loss, accuracy, speed, *left = found.groups()
    days, hours, minutes, seconds = (int(number or 0) for number in left)
    eta = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return Progress(epoch, epochs, int(step), int(steps), loss, accuracy, speed.partition(".")[0], eta)


class LiveView:
    """Lines of progress move the bar; all other lines are printed above it. It is redrawn only after changes."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._progress: Progress | None = None
        self._eta: float | None = None
        self._words = "submitted"

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        """Show a line of the log."""
        kind = kind_of_line(text)
        if kind == "progress":
            self._progress = parse_progress(text)
            if self._eta is None and self._progress is not None:
                self._eta = self._progress.eta_seconds
        elif kind == "phase":
            self._progress, self._words = None, text[len("2026-01-01 00:00:00 ") :]
        else:
            if kind in ("epoch", "banner", "stop", "good", "trouble"):
                self._progress = None
            self._console.print(Text(text, style_of_line(kind)), soft_wrap=True)
        self._draw()

    def note(self, text: str) -> None:
        """Show a message that is not in the log."""
        self._console.print(Text(f"[{text}]", style_of_line("note")), soft_wrap=True)

    def state(self, state: RunState, words: str) -> None:
        """Show the state in place of a missing bar. Its time left replaces the log's, which ignores restarts."""
        self._words = words
        if state.eta_seconds is not None:
            self._eta = state.eta_seconds
        if state.state != "running":
            self._progress = None
        self._draw()

    def _draw(self) -> None:
        self._live.update(self._renderable(), refresh=True)

    def _renderable(self) -> RenderableType:
        progress = self._progress
        if progress is None:
            left = f"  ETA {duration(self._eta)}" if self._eta is not None else ""
            return Text(f"{self._words}{left}", "yellow", no_wrap=True, overflow="ellipsis")
        before = f"epoch {progress.epoch}/{progress.epochs} "
        parts = [
            f" {progress.step}/{progress.steps}",
            f"loss {progress.loss}",
            f"acc {progress.accuracy}%",
            f"{progress.images_per_second} img/s",
            f"ETA {duration(self._eta)}",
        ]
        while len(parts) > 2 and self._room(before, parts) < LEAST_BAR:
            parts.pop(-2)
        room = self._room(before, parts)
        grid = Table.grid()
        cells: list[RenderableType] = [Text(before, no_wrap=True)]
        if room >= LEAST_BAR:
            cells.append(ProgressBar(total=progress.steps, completed=progress.step, width=min(room, MOST_BAR)))
        grid.add_row(*cells, Text("  ".join(parts), no_wrap=True, overflow="ellipsis"))
        return grid

    def _room(self, before: str, parts: list[str]) -> int:
        return self._console.width - len(before) - len("  ".join(parts)) - 1
