"""python -m cifar_hpc tail, and submit.py --follow: a run's log, until the run ends."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Protocol

from cifar_hpc.following import EpochFollower, LogFollower, StateFollower
from cifar_hpc.jsonfile import NotRegularError
from cifar_hpc.log_colour import paint, style_of_line, wanted
from cifar_hpc.log_lines import kind_of_line
from cifar_hpc.paths import RunPaths, find_run, project_root
from cifar_hpc.printable import printable
from cifar_hpc.run_state import RunState

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
        from cifar_hpc.follow_screen import FollowScreen

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
