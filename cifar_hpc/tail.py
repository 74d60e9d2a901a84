"""python -m cifar_hpc tail, and submit.py --follow: a run's log, from its beginning to the run's end."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cifar_hpc import slurm
from cifar_hpc.errors import SchedulerError
from cifar_hpc.jsonfile import open_regular
from cifar_hpc.paths import RunPaths, find_run, project_root
from cifar_hpc.printable import printable
from cifar_hpc.run_state import RunState, read_state
from cifar_hpc.runlog import read_jsonl

POLL_SECONDS = 0.5
# The queue and the lock are asked less often than the file: thousands of tails must not load the controller.
STATE_SECONDS = 5.0


def tail(run: str, *, epochs_only: bool) -> int:
    """Follow a run; exit status 0 if it finished, 1 if it ended in any other way."""
    return _follow(find_run(project_root(), run), epochs_only=epochs_only)


def follow(paths: RunPaths, hint: str) -> int:
    """Follow a run that was just submitted; Ctrl-C leaves it running and prints `hint`."""
    try:
        return _follow(paths, epochs_only=False)
    except KeyboardInterrupt:
        print(f"\nthe run goes on without you; to come back or to cancel it:\n{hint}", flush=True)
        return 0


class _Follower:
    """Prints what is added to a file; starts over at its beginning when it was replaced or cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def poll(self) -> bool:
        """Print what is new; whether there was anything."""
        if self._file is None:
            if not self.path.exists():
                return False
            self._file = os.fdopen(open_regular(self.path), encoding="utf-8", errors="replace")
        text = self._file.read()
        if text:
            print(printable(text), end="", flush=True)
            return True
        try:
            status, mine = self.path.stat(), self._file.tell()
            replaced = status.st_ino != os.fstat(self._file.fileno()).st_ino or status.st_size < mine
        except OSError:
            replaced = True
        if replaced:
            self.close()
        return False

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class _EpochFollower:
    """Prints a line for each new row of metrics.jsonl; a row that was cut off and computed again is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._epoch = 0

    def poll(self) -> bool:
        """Print what is new; whether there was anything."""
        found = False
        for row in read_jsonl(self.path):
            line = _epoch_line(row)
            if line is not None and row["epoch"] > self._epoch:
                print(line, flush=True)
                self._epoch, found = row["epoch"], True
        return found

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


def _follow(paths: RunPaths, *, epochs_only: bool) -> int:
    with contextlib.closing(_EpochFollower(paths.metrics) if epochs_only else _Follower(paths.train_log)) as follower:
        return _follow_until_the_end(paths, follower)


def _follow_until_the_end(paths: RunPaths, follower: _Follower | _EpochFollower) -> int:
    asked, said = 0.0, ""
    while True:
        # The state is read before the log, so that what was logged up to the end is still printed.
        state: RunState | None = None
        if time.monotonic() - asked >= STATE_SECONDS:
            asked = time.monotonic()
            with contextlib.suppress(SchedulerError):  # a controller that is busy or restarting says nothing new
                state = read_state(paths, slurm.queue(paths.root))
        if follower.poll():
            continue
        if state is not None:
            waiting = f"{state.state}: {state.detail}" if state.state in ("queued", "requeued", "hung") else ""
            if waiting and waiting != said:
                print(f"[{printable(waiting)}]", file=sys.stderr, flush=True)
            said = waiting
            if state.ended:
                if state.state != "finished":
                    print(f"[{state.state}: {printable(state.detail)}]", file=sys.stderr, flush=True)
                return 0 if state.state == "finished" else 1
        time.sleep(POLL_SECONDS)
