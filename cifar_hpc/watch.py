"""python -m cifar_hpc status --watch: a screenful of runs, drawn again in place.

Only lines that have changed are sent, which neither flickers nor fills a slow link.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from cifar_hpc.log_colour import paint, wanted
from cifar_hpc.printable import printable
from cifar_hpc.run_state import RunState
from cifar_hpc.status import Reader, painted, show_on_terminal, show_plain
from cifar_hpc.status_table import by_interest, lines, shorten, summary

if TYPE_CHECKING:
    from rich.console import Console

WATCH_SECONDS = 3.0
LOOKING = 0.2  # the part of the time that is spent on looking, at most
_TO_LINE = "\x1b[{};1H\x1b[K"  # to the beginning of a line, and clear it (ECMA-48: CUP, EL)


def watch(reader: Reader) -> int:
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
