"""python -m cifar_hpc tail, and submit.py --follow: a run's log and its state in the queue, until the run ends.

Prints train.log from its beginning, and new lines until the run ends. A run
that has not started yet is waited for. Ctrl-C ends this command, not the run.
`tail -F logs/RUN/train.log` shows the same lines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cifar_hpc.cli.terminal import paint, use_colour
from cifar_hpc.files import NotRegularError, open_regular
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, find_run, project_root
from cifar_hpc.runs.queue import QueuePoller
from cifar_hpc.runs.state import RunState
from cifar_hpc.text import duration, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EXAMPLES = ("improved_resnet-1a2b3c4d", "improved_resnet-1a2b3c4d --epochs")

LOG_SECONDS = 0.5
# The queue and the lock are read less often than the log: thousands of followers must not load the controller.
STATE_SECONDS = 5.0
REPEAT_SECONDS = 600.0  # after which details that have changed, such as the expected start, are reported again
# A file server may be away for a moment: so many reads in a row must fail before a log, or a run, is given up.
LOG_FAILURES, STATE_FAILURES = 60, 6
_REPORTED = ("queued", "requeued", "hung", "suspended", "unknown")  # states that the log itself does not show
_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
LINES = {  # kind of a line of train.log: (style of `paint`, beginning of the line)
    "banner": ("bold cyan", r"={20}|== "),
    "progress": ("", rf"{_DATE}epoch \d+/\d+ step "),
    "phase": ("", rf"{_DATE}(?:evaluating: |epoch \d+: measuring )"),  # of an epoch's end
    "epoch": ("green", rf"(?:{_DATE})?epoch +\d+(?:/\d+ DONE)?  train loss "),
    "trouble": ("bold red", rf"{_DATE}(?:FAILED|HUNG|OUT OF MEMORY|not requeued)|---- "),
    "warning": ("yellow", rf"{_DATE}WARNING |WARNING "),
    "stop": ("magenta", rf"{_DATE}(?:STOPPED|CANCELLED|JobState=|requeue|timeout|preemption|all processes were)"),
    "good": ("bold", rf"{_DATE}FINISHED "),
    "other": ("", ""),
}
NOTE_STYLE = "yellow"
LEAST_BAR, MOST_BAR = 8, 40  # characters
PROGRESS = re.compile(
    r"[-0-9]{10} [:0-9]{8} epoch (?P<epoch>\d{1,9}/\d{1,9}) step (?P<step>\d{1,9})/(?P<steps>\d{1,9})  "
    r"(?P<loss>loss \S+)  (?P<speed>\S{1,30}?)(?:\.\d*)? img/s  run ETA (?P<eta>(?:\d{1,9}[dhms]){1,2})$"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    parser.add_argument("--epochs", action="store_true", help="only the rows of finished epochs")


def main(arguments: argparse.Namespace) -> int:
    """Follow a run from its beginning; exit status 0 if it finished, 1 if it ended in any other way."""
    paths = find_run(project_root(), arguments.run)
    log = EpochFollower(paths.metrics) if arguments.epochs else LogFollower(paths.train_log)
    return _follow_to_end(paths, log, PlainView())


def follow(paths: RunPaths, hint: str, begin: int = 0) -> int:
    """Follow a run that was just submitted. Ctrl-C leaves it running and prints `hint`.

    Args:
        begin: size of train.log before the submission; older lines are not shown.
    """
    log = LogFollower(paths.train_log, begin)
    try:
        if not sys.stdout.isatty():
            return _follow_to_end(paths, log, PlainView())
        with LiveView() as view:
            return _follow_to_end(paths, log, view)
    except KeyboardInterrupt:
        print(f"\nthe run goes on without you; to come back or to cancel it:\n{hint}", flush=True)
        return 0


def kind_of_line(line: str) -> str:
    """Kind of a line of train.log: one of LINES."""
    return next(kind for kind, (_, beginning) in LINES.items() if re.match(beginning, line))


class PlainView:
    """Lines on standard output and notes on standard error, in colours on a terminal."""

    def __init__(self) -> None:
        self._colour_lines, self._colour_notes = use_colour(sys.stdout), use_colour(sys.stderr)

    def line(self, text: str) -> None:
        """Show a line of the log."""
        print(paint(text, LINES[kind_of_line(text)][0]) if self._colour_lines else text, flush=True)

    def note(self, text: str) -> None:
        """Show a message that is not in the log: about the queue, or the end of the run."""
        note = f"[{text}]"
        print(paint(note, NOTE_STYLE) if self._colour_notes else note, file=sys.stderr, flush=True)

    def state(self, state: RunState, words: str) -> None:
        """Show the state, after each time it was read. Here notes have what matters."""


def eta_seconds(progress: re.Match[str]) -> int:
    """The time left in a line that matches PROGRESS."""
    seconds = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * seconds[unit] for number, unit in re.findall(r"(\d+)([dhms])", progress["eta"]))


class LiveView(PlainView):
    """The log, and below it a progress bar of the epoch, or the state of the run. It is redrawn only after changes."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._progress: re.Match[str] | None = None
        self._eta: float | None = None
        self._words = "submitted"

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def line(self, text: str) -> None:
        """Move the bar by a line of progress; print any other line above it."""
        kind = kind_of_line(text)
        if kind == "progress":
            self._progress = PROGRESS.match(text)
            if self._eta is None and self._progress is not None:
                self._eta = eta_seconds(self._progress)
        elif kind == "phase":
            self._progress, self._words = None, text[len("2026-01-01 00:00:00 ") :]
        else:
            if kind in ("epoch", "banner", "stop", "good", "trouble"):
                self._progress = None
            self._print(text, LINES[kind][0])
        self._draw()

    def note(self, text: str) -> None:
        """Print a message that is not in the log above the bar."""
        self._print(f"[{text}]", NOTE_STYLE)

    def state(self, state: RunState, words: str) -> None:
        """Show the state in place of a missing bar. Its time left replaces the log's, which ignores restarts."""
        self._words = words
        if state.eta_seconds is not None or state.ended:
            self._eta = state.eta_seconds
        if state.state != "running":
            self._progress = None
        self._draw()

    def _print(self, text: str, style: str) -> None:
        self._console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)

    def _draw(self) -> None:
        self._live.update(self._renderable(), refresh=True)

    def _renderable(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        if progress is None:
            left = f"  ETA {duration(self._eta)}" if self._eta is not None else ""
            return Text(f"{self._words}{left}", "yellow", no_wrap=True, overflow="ellipsis")
        before = f"epoch {progress['epoch']} "
        step, steps = int(progress["step"]), int(progress["steps"])
        speed, eta = f"{progress['speed']} img/s", f"ETA {duration(self._eta)}"
        parts = [f" {step}/{steps}", progress["loss"], speed, eta]
        while (room := self._console.width - len(before) - len("  ".join(parts)) - 1) < LEAST_BAR and len(parts) > 2:
            parts.pop(-2)
        grid = Table.grid()
        cells: list[RenderableType] = [Text(before, no_wrap=True)]
        if room >= LEAST_BAR:
            cells.append(ProgressBar(total=steps, completed=step, width=min(room, MOST_BAR)))
        grid.add_row(*cells, Text("  ".join(parts), no_wrap=True, overflow="ellipsis"))
        return grid


def _follow_to_end(paths: RunPaths, log: LogFollower, view: PlainView) -> int:
    states, failures = StateFollower(paths), 0
    with contextlib.closing(log):
        while True:
            # The state is read before the log, so that the last lines before the end are still shown.
            state = states.poll()
            try:
                lines, failures = log.poll(), 0
            except (NotRegularError, PermissionError):
                raise
            except OSError:  # a file server that is away for a moment, or a stale handle
                lines, failures = [], failures + 1
                if failures >= LOG_FAILURES:
                    raise
                log.close()
            ended = states.ended and state is not None and not lines and not failures
            for line in log.rest() if ended else lines:
                view.line(line)
            if state is not None:
                view.state(state, states.words(state))
                if news := states.news(state):
                    view.note(news)
                if ended:
                    if state.state != "finished":
                        view.note(f"{state.state}: {printable(state.detail)}")
                    return 0 if state.state == "finished" else 1
            if not lines:
                time.sleep(LOG_SECONDS)


class LogFollower:
    """Complete lines that are added to a file. A file that is replaced or truncated is read from its beginning.

    begin: offset of the first line; in a file that is shorter by now, 0.
    """

    def __init__(self, path: Path, begin: int = 0) -> None:
        self.path, self._offset = path, begin
        self._file: TextIO | None = None
        self._part = ""  # of a line whose end has not been written yet

    def poll(self) -> list[str]:
        """New lines, in printable characters.

        Raises:
            OSError: it is no regular file, or cannot be read.
        """
        if self._file is None:
            try:
                self._file = os.fdopen(open_regular(self.path), encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return []
            self._file.seek(self._offset if self._offset <= os.fstat(self._file.fileno()).st_size else 0)
        text = self._file.read()
        self._offset = self._file.tell()
        if text:
            *lines, self._part = (self._part + text).split("\n")
            return [printable(line) for line in lines]
        if not self._replaced(self._file):
            return []
        self.close()
        self._offset = 0
        return [*self.rest(), f"[{self.path.name} was replaced or cut; from its beginning:]"]

    def rest(self) -> list[str]:
        """The last line, if its end was never written."""
        part, self._part = self._part, ""
        return [printable(part)] if part else []

    def close(self) -> None:
        """Close the file; the next poll opens it again and continues at the same offset."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _replaced(self, file: TextIO) -> bool:
        try:
            status = self.path.stat()
        except FileNotFoundError:  # moved away; another file may follow
            return True
        return not os.path.samestat(status, os.fstat(file.fileno())) or status.st_size < file.tell()


class EpochFollower(LogFollower):
    """A line for each new epoch in metrics.jsonl; an epoch that is computed again is not repeated."""

    _epoch = 0

    def poll(self) -> list[str]:
        """New lines."""
        lines = []
        for row in read_jsonl(self.path):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # no row of an epoch
                line = (
                    f"epoch {row['epoch']:>4d}  train loss {row['train_loss']:.4f} acc {row['train_accuracy']:6.2f}%  "
                    f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:6.2f}%  lr {row['lr']:.6f}  "
                    f"{row['epoch_seconds']:.1f} s  {row['images_per_second']:,.0f} img/s"
                )
                if row["epoch"] > self._epoch:
                    self._epoch = row["epoch"]
                    lines.append(line)
        return lines


class StateFollower:
    """The state of a run, read every few seconds.

    state: the last one; None before the first poll.

    Args:
        queue: shared by several runs, so that one question to Slurm serves all.
    """

    def __init__(self, paths: RunPaths, queue: QueuePoller | None = None) -> None:
        self.paths = paths
        self.state: RunState | None = None
        self.queue = queue or QueuePoller(paths.root, interval=0.0)
        self._next_poll, self._failures = 0.0, 0
        self._reported, self._reported_kind, self._reported_at = "", ("", ""), 0.0

    def poll(self) -> RunState | None:
        """The state, if it was time to read it; else None."""
        if time.monotonic() < self._next_poll:
            return None
        self.queue.poll()
        (self.state,) = self.queue.read([self.paths], stale=False)
        self._failures = self._failures + 1 if self.state.state == "unreadable" else 0
        self._next_poll = time.monotonic() + STATE_SECONDS
        return self.state

    @property
    def ended(self) -> bool:
        """True once nothing more will happen; files that cannot be read are read again a few times before."""
        return self.state is not None and self.state.ended and not 0 < self._failures < STATE_FAILURES

    def words(self, state: RunState) -> str:
        """`queued: Priority: other jobs go first`; printable."""
        return printable(f"{state.state}: {state.detail}")

    def news(self, state: RunState) -> str:
        """`words`, if the log does not show that state and it was not reported yet; else an empty string."""
        kind = (state.state, "" if state.state == "hung" else state.reason or state.detail)
        words, now = self.words(state), time.monotonic()
        changed = words != self._reported and now - self._reported_at >= REPEAT_SECONDS
        if state.state not in _REPORTED:
            self._reported_kind = ("", "")
        elif kind != self._reported_kind or changed:
            self._reported, self._reported_kind, self._reported_at = words, kind, now
            return words
        return ""
