"""python -m cifar_hpc status: one line a run; with --watch a screenful, drawn again in place.

Only lines that have changed are sent, which neither flickers nor fills a slow link."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_hpc.cli.status_table import Line, by_interest, lines, shorten, summary
from cifar_hpc.cli.terminal import paint, wanted
from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.history_cache import FactsCache
from cifar_hpc.runs.paths import all_runs, find_runs, project_root
from cifar_hpc.runs.state import RunState, read_state
from cifar_hpc.slurm import client as slurm
from cifar_hpc.slurm.client import QueuedJob
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from rich.console import Console


WATCH_SECONDS = 3.0
LOOKING = 0.2  # the part of the time that is spent on looking, at most
_TO_LINE = "\x1b[{};1H\x1b[K"  # to the beginning of a line, and clear it (ECMA-48: CUP, EL)


def watch_screen(reader: Reader) -> int:
    """Show the runs until Ctrl-C, which is the way to end it: exit status 0."""
    from rich.console import Console

    console = Console()
    screen = Screen(console, reader)
    screen.look()  # a mistake in a name is told before anything is drawn
    try:
        if not console.is_terminal or console.is_dumb_terminal:
            while True:
                show_plain(screen.states)
                print(flush=True)
                screen.wait()
                screen.look()
        with console.screen():
            while True:
                screen.draw()
                screen.wait()
                screen.look()
    except KeyboardInterrupt:
        if console.is_terminal:
            show_on_terminal(screen.states)  # stays to be read where the screen was
    return 0


class Screen:
    """What is on the terminal, and what is to be there."""

    def __init__(self, console: Console, reader: Reader) -> None:
        self.console, self.reader = console, reader
        self.states: Sequence[RunState] = []
        self._shown: list[str] = []
        self._size = (0, 0)
        self._next_look = 0.0
        self._coloured = wanted(sys.stdout)

    def look(self) -> None:
        """Read the runs anew, if it is time for that."""
        began = time.monotonic()
        if began < self._next_look:
            return
        self.states = self.reader.read()
        now = time.monotonic()
        self._next_look = now + max(WATCH_SECONDS, (now - began) / LOOKING)

    def wait(self) -> None:
        """Until it is time for another look, or the terminal has another size or was taken back from the shell."""
        told = {signal.SIGWINCH, signal.SIGCONT}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, told)
        try:
            found = signal.sigtimedwait(told, max(0.0, self._next_look - time.monotonic()))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if found is not None and found.si_signo == signal.SIGCONT:
            self._size = (0, 0)

    def draw(self) -> None:
        """Send the lines that differ from what is shown; all of them on a terminal of another size."""
        size = self.console.size
        if size != self._size:
            self._shown, self._size = [], (size.width, size.height)
            self.console.clear()
        wanted_lines = self.frame(size.width, size.height)
        changes = [
            _TO_LINE.format(number + 1) + line
            for number, line in enumerate(wanted_lines)
            if number >= len(self._shown) or line != self._shown[number]
        ]
        changes += [_TO_LINE.format(n + 1) for n in range(len(wanted_lines), len(self._shown))]
        self.console.file.write("".join(changes))
        self.console.file.flush()
        self._shown = wanted_lines

    def frame(self, width: int, height: int) -> list[str]:
        """The lines for a terminal of this size, at most `height`."""
        states = by_interest(self.states)
        room = max(1, height - 2 - bool(self.reader.trouble))  # beside the head and the notes
        notes = self._notes(max(0, len(states) - room))
        table = [painted(line) if self._coloured else line.text for line in lines(states[:room], width)]
        return [*table, *(paint(shorten(n, width), "bold" if self._coloured else "") for n in notes)][:height]

    def _notes(self, hidden: int) -> list[str]:
        more = f"{hidden} not shown; " if hidden else ""
        notes = [f"{datetime.now():%H:%M:%S}  {more}{summary(self.states)}"]
        if self.reader.trouble:
            last = self.reader.asked_at
            since = f"what it said at {datetime.fromtimestamp(last):%H:%M:%S} is shown" if last else "files alone tell"
            words = self.reader.trouble.rpartition("was refused: ")[2]
            notes.append(f"Slurm does not answer, {since}: {' '.join(printable(words).split())}")
        return notes


# The queue is asked less often than files are read: many watchers must not load the controller.
QUEUE_SECONDS, QUEUE_TIMEOUT_SECONDS = 10.0, 10.0


def status(runs: Sequence[str], *, watch: bool, as_json: bool) -> int:
    """Print the state of `runs`, names or patterns, or of all.

    Returns:
        the exit status: 0, or 3 where Slurm does not answer, and only the files tell.
    """
    reader = Reader(project_root(), runs)
    if watch and not as_json:
        return watch_screen(reader)
    states = reader.read()
    if as_json:
        print(json.dumps([s.plain() for s in states], indent=1))
    elif not states:
        print(f"no runs under {reader.root / 'logs'} yet. HINT: python submit.py --help")
    elif sys.stdout.isatty():
        show_on_terminal(states)
    else:
        show_plain(states)
    if reader.trouble:
        print(f"error: {printable(reader.trouble)}", file=sys.stderr)
        return SchedulerError.exit_code
    return 0


class Reader:
    """The states of runs, one look after another.

    trouble: Slurm's words where it does not answer; the jobs are then the last that it told of, if it ever has.
    asked_at: when it was asked what it last answered, in seconds since the epoch.
    """

    def __init__(self, root: Path, runs: Sequence[str]) -> None:
        self.root, self.runs = root, runs
        self.trouble = ""
        self.asked_at: float | None = None
        self._jobs: Mapping[str, QueuedJob] | None = None
        self._ask_next = 0.0
        self._cache = FactsCache(root)

    def read(self) -> list[RunState]:
        """The states by the runs' names.

        Raises:
            SpecError: for a pattern that no run matches.
        """
        found = find_runs(self.root, self.runs) if self.runs else all_runs(self.root)
        self._ask()
        states = [read_state(paths, self._jobs, self._cache.facts, self.asked_at) for paths in found]
        if not self.runs:
            self._cache.save()  # which keeps no others than those that were read
        return states

    def _ask(self) -> None:
        if time.monotonic() < self._ask_next:
            return
        asked_at = time.time()
        try:
            self._jobs = run_queue.queue(self.root, QUEUE_TIMEOUT_SECONDS)
            self.trouble, self.asked_at = "", asked_at
        except SchedulerError as error:
            self.trouble = str(error)
        self._ask_next = time.monotonic() + (slurm.SILENT_SECONDS if self.trouble else QUEUE_SECONDS)


def show_plain(states: Sequence[RunState]) -> None:
    """By name, in full, without colours: for a pipe or a file."""
    for line in lines(states):
        print(line.text)


def show_on_terminal(states: Sequence[RunState]) -> None:
    """What calls for a look comes last, next to the prompt."""
    coloured, width = wanted(sys.stdout), shutil.get_terminal_size().columns
    for line in lines(by_interest(states, last=True), width):
        print(painted(line) if coloured else line.text)
    print(textwrap.fill(summary(states), width))


def painted(line: Line) -> str:
    """A line with the colour of its state; all of it, where nothing of it calls for a look."""
    if line.style == "dim":
        return paint(line.text, "dim")
    if not line.style:
        return paint(line.text, "bold")
    return line.before + paint(line.state, line.style) + line.after
