"""python -m cifar_hpc tail, and submit.py --follow: a run's log and its state in the queue, until the run ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from cifar_hpc.cli.terminal import paint, style_of_line, wanted
from cifar_hpc.errors import SchedulerError
from cifar_hpc.files import NotRegularError, open_regular
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.eta import kind_of_line
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, find_run, project_root
from cifar_hpc.runs.state import RunState, read_state
from cifar_hpc.slurm import client as slurm
from cifar_hpc.text import printable

# The queue and the lock are asked less often than the file, and the others' jobs still less often: thousands of
# followers must not load the controller.
STATE_SECONDS, AHEAD_SECONDS, TIMEOUT_SECONDS = 5.0, 30.0, 10.0
# What is said of a waiting run is said again so often where it has changed, such as the expected start.
SAY_AGAIN_SECONDS = 600.0
# So many looks in a row at a run whose files cannot be read are its end: a file server may be away for a moment.
UNREADABLE_LOOKS = 6
_SAID = ("queued", "requeued", "hung", "suspended", "unknown")  # what the log itself does not tell


class LogFollower:
    """The whole lines that are added to a file; from its beginning again when it was replaced or cut.

    begin: where to begin; a file that is shorter by now is read from its beginning.
    """

    def __init__(self, path: Path, begin: int = 0) -> None:
        self.path, self._begin = path, begin
        self._file: TextIO | None = None
        self._part = ""  # of a line whose end has not been written yet

    def poll(self) -> list[str]:
        """The new lines, in printable characters.

        Raises:
            OSError: it is no regular file, or cannot be read.
        """
        if self._file is None and not self._open():
            return []
        assert self._file is not None
        text = self._file.read()
        self._begin = self._file.tell()
        if text:
            *whole, self._part = (self._part + text).split("\n")
            return [printable(line) for line in whole]
        if not self._replaced():
            return []
        rest = self.rest()
        self.close()
        self._begin = 0
        return [*rest, f"[{self.path.name} was replaced or cut; from its beginning:]"]

    def rest(self) -> list[str]:
        """The last line, where its end was never written."""
        part, self._part = self._part, ""
        return [printable(part)] if part else []

    def close(self) -> None:
        """Let go of the file; the next look opens it anew, and goes on where the last one ended."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        try:
            self._file = os.fdopen(open_regular(self.path), encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return False
        if os.fstat(self._file.fileno()).st_size < self._begin:
            self._begin = 0
        self._file.seek(self._begin)
        return True

    def _replaced(self) -> bool:
        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        try:
            status = self.path.stat()
        except FileNotFoundError:  # moved away; what comes in its place is read when it is there
            return True
        return (status.st_ino, status.st_dev) != (mine.st_ino, mine.st_dev) or status.st_size < self._file.tell()


class EpochFollower:
    """A line for each new row of metrics.jsonl; a row that was cut off and computed again is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._epoch = 0

    def poll(self) -> list[str]:
        """The new lines."""
        found = []
        for row in read_jsonl(self.path):
            line = _epoch_line(row)
            if line is not None and row["epoch"] > self._epoch:
                self._epoch = row["epoch"]
                found.append(line)
        return found

    def rest(self) -> list[str]:
        """Rows are whole."""
        return []

    def close(self) -> None:
        """Nothing is open between two looks."""


def _epoch_line(row: Mapping[str, Any]) -> str | None:
    """A row of metrics.jsonl for people, or None where it is no such row."""
    try:
        return (
            f"epoch {row['epoch']:>4d}  train loss {row['train_loss']:.4f} acc {row['train_accuracy']:6.2f}%  "
            f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:6.2f}%  lr {row['lr']:.6f}  "
            f"{row['epoch_seconds']:.1f} s  {row['images_per_second']:,.0f} img/s"
        )
    except (KeyError, TypeError, ValueError):
        return None


class StateFollower:
    """The state of a run, asked for now and then.

    state: the last known; None before the first look.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.state: RunState | None = None
        self._jobs: Mapping[str, slurm.QueuedJob] | None = None
        self._asked_at: float | None = None
        self._look_next = self._ask_next = self._ahead_next = 0.0
        self._ahead: int | None = None
        self._unreadable = 0
        self._said, self._said_kind, self._said_at = "", ("", ""), 0.0

    def poll(self) -> RunState | None:
        """The state, where it was time for another look."""
        if time.monotonic() < self._look_next:
            return None
        self._ask()
        self.state = read_state(self.paths, self._jobs, asked_at=self._asked_at)
        self._unreadable = self._unreadable + 1 if self.state.state == "unreadable" else 0
        self._count_ahead(self._jobs or {})
        self._look_next = time.monotonic() + STATE_SECONDS
        return self.state

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more; files that cannot be read are looked at some times before."""
        return self.state is not None and self.state.ended and not 0 < self._unreadable < UNREADABLE_LOOKS

    def _ask(self) -> None:
        if time.monotonic() < self._ask_next:
            return
        asked_at = time.time()
        try:
            self._jobs, self._asked_at = run_queue.queue(self.paths.root, TIMEOUT_SECONDS), asked_at
        except SchedulerError:  # busy or restarting
            self._jobs, self._ask_next = None, time.monotonic() + slurm.SILENT_SECONDS

    def words(self) -> str:
        """`queued: Priority: other jobs go first, 3 jobs ahead of it in gpu`; printable."""
        if self.state is None:
            return ""
        ahead = "" if self._ahead is None else f", {self._ahead} job{'s' * (self._ahead != 1)} ahead of it"
        return printable(f"{self.state.state}: {self.state.detail}{ahead}")

    def news(self) -> str:
        """The same, where the log does not tell it and it has not been said yet; else an empty string."""
        state, words, now = self.state, self.words(), time.monotonic()
        if state is None or state.state not in _SAID:
            self._said_kind = ("", "")
            return ""
        kind = (state.state, state.reason or state.detail if state.state != "hung" else "")
        again = words != self._said and now - self._said_at >= SAY_AGAIN_SECONDS
        if kind == self._said_kind and not again:
            return ""
        self._said, self._said_kind, self._said_at = words, kind, now
        return words

    def _count_ahead(self, jobs: Mapping[str, slurm.QueuedJob]) -> None:
        job = jobs.get(self.paths.name)
        if job is None or self.state is None or self.state.reason not in ("Priority", "Resources"):
            self._ahead = None
            return
        if time.monotonic() >= self._ahead_next:
            try:
                self._ahead = slurm.jobs_ahead(job, TIMEOUT_SECONDS)
            except SchedulerError:
                self._ahead = None
            self._ahead_next = time.monotonic() + AHEAD_SECONDS


POLL_SECONDS = 0.5
UNREADABLE_POLLS = 60  # a log that cannot be read for so many looks in a row is no longer waited for


class View(Protocol):
    """Where what is new about a run is shown."""

    def line(self, text: str) -> None:
        """A line of the log."""

    def note(self, text: str) -> None:
        """What the log does not tell: about the queue, and how the run ended."""

    def state(self, state: RunState, words: str) -> None:
        """The state, each time it has been looked at."""


class Plain:
    """Lines to standard output, notes to standard error; in colours on a terminal."""

    def __init__(self) -> None:
        self._colours, self._note_colours = wanted(sys.stdout), wanted(sys.stderr)

    def line(self, text: str) -> None:
        """As it is, or in the colour of its kind."""
        print(paint(text, style_of_line(kind_of_line(text))) if self._colours else text, flush=True)

    def note(self, text: str) -> None:
        """In brackets, as it is no line of the log."""
        note = f"[{text}]"
        print(paint(note, style_of_line("note")) if self._note_colours else note, file=sys.stderr, flush=True)

    def state(self, state: RunState, words: str) -> None:
        """There is no place for it but the notes."""


def tail(run: str, *, epochs_only: bool) -> int:
    """Follow a run from its beginning; exit status 0 if it finished, 1 if it ended in any other way."""
    paths = find_run(project_root(), run)
    return _until_the_end(paths, EpochFollower(paths.metrics) if epochs_only else LogFollower(paths.train_log), Plain())


def follow(paths: RunPaths, hint: str, begin: int = 0) -> int:
    """Follow a run that was just submitted; Ctrl-C leaves it running and prints `hint`.

    Args:
        begin: the size that train.log had before: what was in it then is not shown.
    """
    log = LogFollower(paths.train_log, begin)
    try:
        if not sys.stdout.isatty():
            return _until_the_end(paths, log, Plain())
        from cifar_hpc.cli.tail_screen import FollowScreen

        with FollowScreen() as screen:
            return _until_the_end(paths, log, screen)
    except KeyboardInterrupt:
        print(f"\nthe run goes on without you; to come back or to cancel it:\n{hint}", flush=True)
        return 0


def _until_the_end(paths: RunPaths, log: LogFollower | EpochFollower, view: View) -> int:
    states, failures = StateFollower(paths), 0
    with contextlib.closing(log):
        while True:
            # The state is read before the log, so that what was logged up to the end is still shown.
            state = states.poll()
            try:
                lines, failures = log.poll(), 0
            except (NotRegularError, PermissionError):
                raise
            except OSError:  # a file server that is away for a moment, a handle that has become stale
                lines, failures = [], failures + 1
                if failures >= UNREADABLE_POLLS:
                    raise
                log.close()
            for line in lines:
                view.line(line)
            if state is not None:
                view.state(state, states.words())
                if news := states.news():
                    view.note(news)
            if state is not None and states.ended and not lines and not failures:
                for line in log.rest():
                    view.line(line)
                if state.state != "finished":
                    view.note(f"{state.state}: {printable(state.detail)}")
                return 0 if state.state == "finished" else 1
            if not lines:
                time.sleep(POLL_SECONDS)
