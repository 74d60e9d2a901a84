"""python -m cifar_hpc status: one line a run."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_hpc import slurm
from cifar_hpc.errors import SchedulerError
from cifar_hpc.facts_cache import FactsCache
from cifar_hpc.log_colour import paint, wanted
from cifar_hpc.paths import all_runs, find_runs, project_root
from cifar_hpc.printable import printable
from cifar_hpc.run_state import RunState, read_state
from cifar_hpc.slurm import QueuedJob
from cifar_hpc.status_table import Line, by_interest, lines, summary

# The queue is asked less often than files are read: many watchers must not load the controller.
QUEUE_SECONDS, QUEUE_TIMEOUT_SECONDS = 10.0, 10.0


def status(runs: Sequence[str], *, watch: bool, as_json: bool) -> int:
    """Print the state of `runs`, names or patterns, or of all.

    Returns:
        the exit status: 0, or 3 where Slurm does not answer, and only the files tell.
    """
    reader = Reader(project_root(), runs)
    if watch and not as_json:
        from cifar_hpc.watch import watch as watch_runs

        return watch_runs(reader)
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
            self._jobs = slurm.queue(self.root, QUEUE_TIMEOUT_SECONDS)
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
