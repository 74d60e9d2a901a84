"""Notices that a run has stopped getting anywhere, or that a rank is gone, when the main threads cannot."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cifar_hpc.training.distributed.rank_board import Board, Report, describe

TICK_SECONDS = 1.0
# A rank is gone if it has been silent for this long while nobody got anything done (a node that went away takes its
# connections with it, and nobody closes them) ...
SILENT_TICKS = 60
# ... or if its process is gone. Its peers' broken connections tell the main threads of it first, and say more.
PATIENCE_TICKS = 5


class Heart:
    """Counts what the main thread of a rank gets done."""

    def __init__(self) -> None:
        self.count, self.doing, self.step = 0, "starting", 0

    def beat(self, doing: str, step: int | None = None) -> None:
        """One more thing is done; `doing` is what comes now."""
        self.count += 1
        self.doing = doing
        if step is not None:
            self.step = step


class Watchdog:
    """Two threads: one exchanges news with the other ranks, the other counts for how long there was none.

    Time is counted in ticks that were lived through, so that a job suspended as a whole (scontrol suspend, SIGSTOP)
    has not hung when it comes back.

    Args:
        limit_seconds: no rank got anything done for so long: the run hangs. Ranks wait for each other after every
            step, so one that is stuck stops them all.
        end: called, from a thread of this class, with the report that ends this rank. It does not return.
    """

    def __init__(self, board: Board, heart: Heart, limit_seconds: float, end: Callable[[Report], None]) -> None:
        self.board, self.heart, self.end = board, heart, end
        self.limit = max(2, round(limit_seconds / TICK_SECONDS))
        self.everyone: dict[int, dict[str, Any]] = {}
        self._idle = 0  # ticks since anybody got anything done, as far as is known here
        self._broken = 0  # ticks since the connection to rank 0 broke
        self._failure: Report | None = None
        self._failed_for = 0
        self._lived, self._total = 0, ""
        self._still: dict[int, int] = {}  # rank 0: ticks since a rank has shown anything
        self._gone: dict[int, int] = {}  # rank 0: ticks since a rank's process has been seen to be gone
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {work.__name__.strip('_')}", daemon=True)
            for work in (self._exchange, self._watch)
        ]

    def start(self) -> Watchdog:
        """Begin to watch."""
        # At once, so that who is killed while the process group is set up has been seen before.
        with contextlib.suppress(dist.DistError):
            self.exchange()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Watch no longer: what comes now may take its time."""
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * TICK_SECONDS)

    # ------------------------------------------------------------ news

    def _exchange(self) -> None:
        with contextlib.suppress(dist.DistError):
            while not self._over.wait(TICK_SECONDS):
                self.exchange()
            return
        self._broken = 1

    def exchange(self) -> None:
        """Show the others how far this rank is, and see how far they are.

        Raises:
            DistError: where rank 0, which serves the store, is gone.
        """
        self._lived += 1
        heart = self.heart
        self.board.show(
            host=socket.gethostname(),
            space=_pid_space(),
            pid=os.getpid(),
            lived=self._lived,
            count=heart.count,
            doing=heart.doing,
            step=heart.step,
        )
        if self.board.rank == 0:
            self._look_around()
            self.board.tell("total", str(sum(shown["count"] for shown in self.everyone.values())))
        self._failure = self.board.failure()
        total = self.board.ask("total") or str(heart.count)
        if total != self._total:
            self._idle, self._total = 0, total

    def _look_around(self) -> None:
        before, self.everyone = self.everyone, self.board.look()
        here = self.everyone.get(0, {})
        for rank, shown in self.everyone.items():
            self._still[rank] = self._still.get(rank, 0) + 1 if shown == before.get(rank) else 0
            same_host = (shown["host"], shown["space"]) == (here.get("host"), here.get("space"))
            dead = same_host and not _lives(shown["pid"])
            self._gone[rank] = self._gone.get(rank, 0) + 1 if dead else 0

    # ------------------------------------------------------------ time

    def _watch(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            # If not even this thread gets on, as where a call never gives back the interpreter's lock.
            with contextlib.suppress(ValueError):  # a standard error that is no file
                faulthandler.dump_traceback_later(2 * self.limit * TICK_SECONDS + 60, exit=True)
            report = self.tick()
            if report is not None:
                self.end(report)
        faulthandler.cancel_dump_traceback_later()

    def tick(self) -> Report | None:
        """One more tick has passed; the report that ends this rank, if it has to end."""
        self._idle += 1
        self._broken += self._broken > 0
        self._failed_for += self._failure is not None
        return self._verdict()

    def _verdict(self) -> Report | None:
        if self._failure is not None:
            # The main thread hears of it by its own means, unless it is stuck.
            stuck = self._failure.cause == "hang" or self._failed_for > PATIENCE_TICKS
            return self._failure if stuck else None
        if self._broken > PATIENCE_TICKS:
            return self._report("lost", "rank 0 is gone: its process was killed, or its node was lost")
        lost = [r for r, t in self._gone.items() if t > PATIENCE_TICKS]
        if self._idle > SILENT_TICKS:
            lost += [r for r, t in self._still.items() if t > SILENT_TICKS and r not in lost]
        if lost and self._idle > PATIENCE_TICKS:
            return self._report("lost", f"{describe(self.everyone, lost)}: gone. Killed, or the node was lost")
        # Rank 0 sees all of them and decides; the others only where rank 0 is the one that is stuck.
        if self._idle > self.limit + (2 * PATIENCE_TICKS if self.board.rank else 0):
            return self._report("hang", self._hang())
        return None

    def _hang(self) -> str:
        text = (
            f"nothing has been done by any rank for {self._idle * TICK_SECONDS / 60:.1f} min (train.watchdog_minutes)"
        )
        if self.board.rank:
            return f"{text}, and rank 0 does not answer; here rank {self.board.rank} was at: {self.heart.doing}"
        stopped = [rank for rank, ticks in self._still.items() if ticks > self.limit // 2]
        if stopped:
            text += f"; stopped or without a network: {describe(self.everyone, stopped)}"
        behind = min((shown["count"] for shown in self.everyone.values()), default=0)
        slow = [r for r, shown in self.everyone.items() if shown["count"] == behind and r not in stopped]
        return f"{text}; the furthest behind: {describe(self.everyone, slow)}" if slow and not stopped else text

    def _report(self, cause: str, text: str) -> Report:
        host = socket.gethostname()
        return Report(self.board.rank, host, cause, text.partition(":")[0], text, self.heart.step, again=True)


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _pid_space() -> str:
    """The namespace in which process ids of this process hold (pid_namespaces(7))."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return "?"


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
