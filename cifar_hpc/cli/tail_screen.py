"""submit.py --follow on a terminal: the log's lines, and below them a bar of the epoch, or what is waited for."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cifar_hpc.cli.status_table import duration
from cifar_hpc.cli.terminal import style_of_line
from cifar_hpc.runs.eta import Progress, kind_of_line, parse_progress
from cifar_hpc.runs.state import RunState

LEAST_BAR, MOST_BAR = 8, 40


class FollowScreen:
    """Lines of progress move the bar; all others are printed above it. Redrawn only where something has changed."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._progress: Progress | None = None
        self._eta: float | None = None
        self._words = "submitted"

    def __enter__(self) -> FollowScreen:
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        """A line of the log."""
        kind = kind_of_line(text)
        if kind == "progress":
            self._progress = parse_progress(text)
            if self._eta is None and self._progress is not None:
                self._eta = self._progress.eta_seconds
            return self._draw()
        if kind == "phase":
            self._progress, self._words = None, text[len("2026-01-01 00:00:00 ") :]
            return self._draw()
        if kind in ("epoch", "banner", "stop", "good", "trouble"):
            self._progress = None
        self._console.print(Text(text, style_of_line(kind)), soft_wrap=True)
        self._draw()
        return None

    def note(self, text: str) -> None:
        """What the log does not tell."""
        self._console.print(Text(f"[{text}]", style_of_line("note")), soft_wrap=True)

    def state(self, state: RunState, words: str) -> None:
        """What stands where the bar is while there is none; and the time left, which knows about restarts."""
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
            f"{progress.images_per_second:,.0f} img/s",
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
