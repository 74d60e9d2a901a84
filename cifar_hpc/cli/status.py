"""python -m cifar_hpc status: a line for each run; with --watch a screen that is updated in place.

States: queued (with the reason), running, requeued, hung (no log line for
much longer than usual), suspended (by Slurm), stopping (Slurm ends the job),
finished, failed (with the reason), cancelled, stopped (killed, or gone without
a message: submit again), not started (never submitted), unreadable (damaged
files), unknown (Slurm does not answer).

One call of squeue serves all runs, and a second one asks for the jobs of
others; none is needed where there is no Slurm.
In a pipe each run is one plain line, --json is for programs. Exit status: 0, 2
bad arguments, 3 Slurm does not answer, so that the files alone are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_hpc.cli.terminal import GAP, Column, display_width, fit, lay_out, least_width, paint, shorten, use_colour
from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs.paths import all_runs, find_runs, project_root, sweep_order
from cifar_hpc.runs.queue import QueuePoller
from cifar_hpc.runs.state import WAITING, RunState, expected
from cifar_hpc.text import counted, duration, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = ("", "'dropout-*' --watch", "improved_resnet-1a2b3c4d --json")

READ_SECONDS = 3.0  # between two reads of --watch
READ_SHARE = 0.2  # of the time that --watch spends on reading, at most
QUEUE_SECONDS = 10.0  # Slurm is asked less often than files are read: many watchers must not load the controller
_TO_LINE = "\x1b[{};1H\x1b[K"  # to the beginning of a line, and clear it (ECMA-48: CUP, EL)

CHANGED = "CHANGED"  # a column beside RUN, where there is a sweep
COLUMNS = ("RUN", "STATE", "EPOCH", "ACC", "BEST", "IMG/S", "ETA", "RESTARTS", "RANKS", "LOG AGE", "JOB", "DETAIL")
NUMBERS = ("EPOCH", "ACC", "BEST", "IMG/S", "ETA", "RANKS", "LOG AGE")
# Columns that are left out of a narrow table, the first one first. RESTARTS loses its causes before that. DETAIL has
# RESTARTS and ETA where they have no column.
DROPPED = ("RANKS", "JOB", "LOG AGE", "IMG/S", "BEST", "RESTARTS", "ETA", "ACC")
SPARE = 4  # so many of them are left out before a reason is cut
LEAST_DETAIL, LEAST_NAME = 20, 12  # characters that a reason, and a run's name, get on any terminal
NARROW_DETAIL = 13  # a reason that needs more lines is better than no ACC
# From the most to the least urgent.
STYLES = {
    "hung": "bold red",
    "running": "green",
    "suspended": "yellow",
    "stopping": "magenta",
    "failed": "red",
    "queued": "yellow",
    "requeued": "yellow",
    "unknown": "yellow",
    "stopped": "magenta",
    "unreadable": "red",
    "cancelled": "dim",
    "not started": "dim",
    "finished": "dim",
}
URGENCY = tuple(STYLES)
OLD_SECONDS = 86400.0  # after which a failure is no news
REASONS_SHOWN, DETAIL_LINES = 5, 3
HINT = " HINT: "  # in a reason: what follows is not in the table
CAUSES = {"submitted": "submitted again"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="only these runs; names or patterns such as 'dropout-*'")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--watch", action="store_true", help="redraw every few seconds until Ctrl-C")
    form.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Print the state of the runs; returns the exit status."""
    reader = Reader(project_root(), arguments.runs)
    if arguments.watch:
        return watch(reader)
    states = reader.read()
    if arguments.json:
        print(json.dumps([s.plain() for s in states], indent=1))
    elif not states:
        print(f"no runs under {reader.root / 'logs'} yet. HINT: python submit.py --help")
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _print_on_terminal(states)
    else:
        print(*table(states)[0], sep="\n")
    if reader.queue.trouble:
        print(f"error: {printable(reader.queue.trouble)}", file=sys.stderr)
        return SchedulerError.exit_code
    return 0


class Reader:
    """The states of runs, with one call of squeue for all. While Slurm does not answer, its last answer counts."""

    def __init__(self, root: Path, runs: Sequence[str]) -> None:
        self.root, self.runs = root, runs
        self.queue = QueuePoller(root, QUEUE_SECONDS)

    def read(self) -> list[RunState]:
        """The states by name, points of a sweep in its order.

        Raises:
            SpecError: no run matches a pattern.
        """
        found = find_runs(self.root, self.runs) if self.runs else all_runs(self.root)
        self.queue.poll()
        order = sweep_order(self.root)
        # A point that waits on this machine has not been submitted yet.
        states = [
            replace(state, sweep=order[state.run][0]) if state.user is None and state.run in order else state
            for state in self.queue.read(found)
        ]
        return sorted(states, key=lambda state: (state.sweep or state.run, order.get(state.run, ("", 0)), state.run))


def watch(reader: Reader) -> int:
    """Show the runs until Ctrl-C, the normal end: exit status 0."""
    from rich.console import Console

    console = Console()
    screen = Screen(console, reader)
    screen.read()  # reports a wrong name before anything is drawn
    on_terminal = console.is_terminal and not console.is_dumb_terminal
    try:
        with console.screen() if on_terminal else nullcontext():
            while True:
                if on_terminal:
                    screen.draw()
                else:
                    print(*table(screen.states)[0], "", sep="\n", flush=True)
                screen.wait()
                screen.read()
    except KeyboardInterrupt:
        if console.is_terminal:
            _print_on_terminal(screen.states)  # remains after the screen is gone
    return 0


class Screen:
    """A terminal's content. Only lines that change are sent, which neither flickers nor fills a slow connection."""

    def __init__(self, console: Console, reader: Reader) -> None:
        self.console, self.reader = console, reader
        self.states: Sequence[RunState] = []
        self._shown: list[str] = []
        self._size = (0, 0)
        self._next_read = 0.0
        self._coloured = use_colour(sys.stdout)

    def read(self) -> None:
        """Read the runs, if it is time to."""
        began = time.monotonic()
        if began < self._next_read:
            return
        self.states = self.reader.read()
        now = time.monotonic()
        self._next_read = now + max(READ_SECONDS, (now - began) / READ_SHARE)

    def wait(self) -> None:
        """Wait for the next read, a new size of the terminal, or a return from the shell."""
        signals = {signal.SIGWINCH, signal.SIGCONT}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            found = signal.sigtimedwait(signals, max(0.0, self._next_read - time.monotonic()))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if found is not None and found.si_signo == signal.SIGCONT:
            self._size = (0, 0)

    def draw(self) -> None:
        """Send the lines that differ from the shown ones; all lines after a change of size."""
        size = self.console.size
        if size != self._size:
            self._shown, self._size = [], (size.width, size.height)
            self.console.clear()
        lines = self.frame(size.width, size.height)
        pairs = enumerate(zip_longest(lines, self._shown), 1)
        changes = [_TO_LINE.format(number) + (line or "") for number, (line, before) in pairs if line != before]
        self.console.file.write("".join(changes))
        self.console.file.flush()
        self._shown = lines

    def frame(self, width: int, height: int) -> list[str]:
        """The lines for a terminal of this size, at most `height`."""
        states = by_urgency(self.states)
        room = max(2, height - 1 - bool(self.reader.queue.trouble))  # besides the notes
        shown = min(len(states), room - 1)
        lines, cut = table(states[:shown], width, self._coloured)
        while len(lines) > room and shown > 1:
            shown -= -((room - len(lines)) // DETAIL_LINES)
            lines, cut = table(states[:shown], width, self._coloured)
        notes = [shorten(note, width) for note in self._notes(len(states) - shown)]
        notes = [paint(note, "bold") if self._coloured else note for note in notes]
        return [*lines[:room], *notes, *reasons(cut, width)][:height]

    def _notes(self, hidden: int) -> list[str]:
        more = f"{hidden} not shown; " if hidden else ""
        notes = [f"{datetime.now():%H:%M:%S}  {more}{summary(self.states)}"]
        queue = self.reader.queue
        if queue.trouble:
            last = queue.asked_at
            shown = f"its answer of {datetime.fromtimestamp(last):%H:%M:%S} is shown" if last else "only files are read"
            words = queue.trouble.rpartition("was refused: ")[2]
            notes.append(f"Slurm does not answer, {shown}: {one_line(words)}")
        return notes


def _print_on_terminal(states: Sequence[RunState]) -> None:
    """Print what fits, with the most urgent runs last, next to the prompt."""
    width = shutil.get_terminal_size().columns
    lines, cut = table(by_urgency(states, last=True), width, use_colour(sys.stdout))
    print(*lines, textwrap.fill(summary(states), width), *reasons(by_urgency(cut), width), sep="\n")


def by_urgency(states: Sequence[RunState], *, last: bool = False) -> list[RunState]:
    """States with the most urgent first, or last; equally urgent ones stay in their order."""
    sign = -1 if last else 1

    def urgency(state: RunState) -> int:
        old = state.state == "failed" and (state.log_age_seconds or 0.0) > OLD_SECONDS
        return sign * (len(URGENCY) if old else URGENCY.index(state.state))

    return sorted(states, key=urgency)


def _settings(states: Sequence[RunState]) -> dict[str, dict[str, str]]:
    """By run of a sweep: what tells it from the sweep's other runs, in words by short key."""
    sweeps: dict[str, list[RunState]] = {}
    for state in states:
        if state.sweep and state.changed is not None:
            sweeps.setdefault(state.sweep, []).append(state)
    found: dict[str, dict[str, str]] = {}
    for points in sweeps.values():
        from cifar_hpc.runs.results import sweep_settings

        found |= zip([p.run for p in points], sweep_settings([p.changed or {} for p in points]), strict=True)
    return found


def reasons(cut: Sequence[RunState], width: int) -> list[str]:
    """The whole reasons of the first few of the runs whose DETAIL is cut, failures first."""
    fresh = [state for state in cut if not (state.ended and (state.log_age_seconds or 0.0) > OLD_SECONDS)]
    fresh.sort(key=lambda state: state.state != "failed")
    texts = [f"{state.run}: {one_line(state.detail)}" for state in fresh[:REASONS_SHOWN]]
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def summary(states: Sequence[RunState]) -> str:
    """`24 runs: 3 running, 2 queued, 19 finished`."""
    counts = {name: sum(state.state == name for state in states) for name in URGENCY}
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{counted(len(states), 'run')}: {words}"


def table(
    states: Sequence[RunState], width: int | None = None, coloured: bool = False
) -> tuple[list[str], list[RunState]]:
    """The headings and a row for each run; and the runs whose DETAIL does not have all of its words.

    Args:
        width: of the terminal, in characters; None for all columns in full, each row in one line.
    """
    cut: list[RunState] = []
    rows = [cells(state) for state in states]
    *columns, detail = (Column(name, [row[name] for row in rows], name in NUMBERS) for name in COLUMNS)
    if settings := _settings(states):
        columns.insert(1, _changed([settings.get(state.run, {}) for state in states], width))
    if width is not None:
        longest = max((display_width(text.partition(HINT)[0]) for text in detail.cells), default=0)
        full = max(
            (display_width(_detail(s, x, (), width)) for s, x in zip(states, detail.cells, strict=True)), default=0
        )
        columns = _fitted(columns, width, longest, min(full, LEAST_DETAIL))
        headings = {column.heading for column in columns}
        room = width - least_width(columns) - len(GAP)
        details = [_detail(state, text, headings, room) for state, text in zip(states, detail.cells, strict=True)]
        pairs = zip(states, details, detail.cells, strict=True)
        cut = [state for state, short, whole in pairs if "…" in short or HINT in whole]
        fits = all(len(text) <= room for text in details)
        columns = fit([*columns, Column("DETAIL", details, separator="" if fits else " ")], width, ())
    else:
        columns = [*columns, detail]
    styles = [(None if (style := STYLES[state.state]) == "dim" else 1, style) for state in states]
    return lay_out(columns, width, [(None, "bold"), *styles] if coloured else ()), cut


def _changed(values: Sequence[dict[str, str]], width: int | None) -> Column:
    """Column of the values that differ between points of sweeps; on a narrow terminal their keys are in the heading, if
    all points have the same ones."""
    texts = [one_line(", ".join(f"{key} {value}".strip() for key, value in row.items())) or "-" for row in values]
    column, keys = Column(CHANGED, texts), {tuple(row) for row in values if row}
    if width is None or column.width <= width // 4:
        return column
    if len(keys) == 1:
        column = Column(", ".join(*keys), [one_line(", ".join(row.values())) or "-" for row in values])
    most = width // 3
    return Column(shorten(column.heading, most), [shorten(text, most) for text in column.cells])


def _fitted(columns: Sequence[Column], width: int, wanted: int, least: int) -> list[Column]:
    """The columns that leave room for DETAIL, with shorter cells if needed.

    Args:
        wanted: width of DETAIL in full, for a third of the line at most columns are left out that are empty or among
            the first SPARE of DROPPED.
        least: width that DETAIL gets in any case.
    """
    fitted, room = list(columns), width - least - len(GAP)
    fitted[0] = _shortened(fitted[0], max(len("improved_resnet-01234567"), width // 5))
    some = width - min(wanted, width // 3) - len(GAP)
    if least_width(fitted) > some:
        restarts = next(i for i, column in enumerate(fitted) if column.heading == "RESTARTS")
        fitted[restarts] = Column("RESTARTS", [cell.partition(" ")[0] for cell in fitted[restarts].cells])
    empty = [column.heading for column in columns if column.heading in DROPPED and set(column.cells) == {"-"}]
    fitted = fit(fitted, some, [*empty, *DROPPED[:SPARE]])
    *others, accuracy = DROPPED
    fitted = fit(fitted, room, others)
    narrow = room + max(0, least - NARROW_DETAIL)
    room = narrow if least_width(fitted) <= narrow else room
    fitted = fit(fitted, room, [accuracy])
    over = least_width(fitted) - room
    return [_shortened(fitted[0], max(LEAST_NAME, fitted[0].width - over)), *fitted[1:]] if over > 0 else fitted


def _shortened(names: Column, longest: int) -> Column:
    return Column(names.heading, [shorten(name, longest, keep_end=9) for name in names.cells])


def _detail(state: RunState, detail: str, columns: Collection[str], room: int) -> str:
    """DETAIL with the values that have no column, in fewer words where it is too long for a few lines."""
    eta = f"ETA {duration(state.eta_seconds)}" if state.eta_seconds is not None and "ETA" not in columns else ""
    hidden = state.restarts and not state.ended and "RESTARTS" not in columns
    restarts = counted(state.restarts, "restart") if hidden else ""
    detail = detail.partition(HINT)[0]
    if state.reason not in (None, "Dependency") and detail.startswith(f"{state.reason}: ") and len(detail) > room:
        start = datetime.fromisoformat(state.start_time) if state.start_time else None
        soon = expected(start, datetime.now(UTC)).removeprefix("starts ")
        detail = ", ".join(filter(None, (detail.partition(":")[0], soon)))
    parts = (detail, eta, restarts) if state.state in WAITING else (eta, restarts, detail)
    text = ", ".join(filter(None, parts))
    if display_width(text) <= room:
        return text
    lines = textwrap.wrap(text, max(room, 1), break_long_words=False, break_on_hyphens=False)
    shown = " ".join(shorten(line, room) for line in lines[:DETAIL_LINES])
    return shown if len(lines) <= DETAIL_LINES else f"{shown[:-1]}…"


def cells(state: RunState) -> dict[str, str]:
    """A cell for each column, each on one line, in printable characters."""
    position = state.epoch + (state.epoch_progress or 0.0) if state.position is None else state.position
    done = math.floor(10 * position + 1e-6) / 10  # never the next one
    causes = [(count, CAUSES.get(cause, cause)) for cause, count in sorted(state.restart_causes.items())]
    by_cause = causes[0][1] if len(causes) == 1 else ", ".join(f"{count} {cause}" for count, cause in causes)
    row = {
        "RUN": state.run,
        "STATE": state.state,
        "EPOCH": f"{done:g}/{state.epochs}",
        "ACC": _percent(state.test_accuracy),
        "BEST": _percent(state.best_accuracy),
        "IMG/S": "-"
        if state.images_per_second is None or state.state != "running" or not state.world_size  # it is starting
        else f"{state.images_per_second:,.0f}",
        "ETA": duration(state.eta_seconds),
        "RESTARTS": f"{state.restarts}" + (f" ({by_cause})" if causes else ""),
        "RANKS": str(state.world_size or "-"),
        "LOG AGE": duration(state.log_age_seconds),
        "JOB": str(state.job_id or "-"),
        "DETAIL": state.detail,
    }
    return {column: one_line(cell) for column, cell in row.items()}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
