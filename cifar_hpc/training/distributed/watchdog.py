"""Ranks watch each other: status of all in a shared store, and a thread that finds hangs and lost ranks."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from cifar_hpc.training.environment import peak_memory_bytes
from cifar_hpc.training.process import is_running

T = TypeVar("T")
# The server of the store lives in rank 0; after this long without an answer it counts as gone. So does a machine.
ANSWER_SECONDS = 5.0
TICK_SECONDS = 1.0
# So often, while no rank makes progress, the hosts of silent ranks are asked. A node that went away takes its
# connections with it, and they are not closed; a rank that is suspended longer than the others is as silent, but its
# host answers.
SILENT_TICKS = 60
DISCARD_PORT = 9
# A rank is gone as well if its process is. Its peers' broken connections tell the main threads first, and say more.
PATIENCE_TICKS = 5
# A call that holds the interpreter's lock for twice the limit and so much longer ends the process.
LAST_RESORT_SECONDS = 60


@dataclass(frozen=True)
class Report:
    """The reason why a rank cannot go on.

    cause: "error", "out_of_memory", "hang" or "lost" (contact with another rank).
    text: for the log; a traceback if there is one.
    retryable: whether another try may help.
    bad_node: name of this rank's node, if the fault is the node's; else empty.
    """

    rank: int
    host: str
    cause: str
    summary: str
    text: str
    step: int
    retryable: bool
    status: int = 1
    bad_node: str = ""


class RankBoard:
    """Keys that the ranks of one attempt share. Every method may be called from any thread.

    Args:
        store: the store through which the ranks have met; None for a single process.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A connection of its own: one that waits for a key, as the set-up of a process group does, is blocked.
        self._store = dist.PrefixStore("board", dist.HashStore() if store is None else store.clone())
        self.silent = False  # whether the store, and so rank 0, has stopped answering

    def set(self, key: str, value: str = "") -> None:
        """Set a key."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """The value of a key; None if it is not set."""
        return self.wait(key) if self._store.check([key]) else None

    def wait(self, key: str) -> str:
        """The value of a key, once it is set."""
        return str(self._store.get(key), "utf-8")

    def set_once(self, key: str, value: str) -> str:
        """Set a key unless another rank already has; returns its value."""
        return str(self._store.compare_set(key, "", value), "utf-8")

    def post(self, **status: Any) -> None:
        """Publish this rank's status."""
        self.set(f"rank/{self.rank}", json.dumps(status))

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The status of each rank that has posted one."""
        texts = {rank: self.get(f"rank/{rank}") for rank in range(self.world_size)}
        return {rank: json.loads(text) for rank, text in texts.items() if text is not None}

    def failure(self) -> Report | None:
        """The report of the rank that failed first, if any has."""
        text = self.get("failure")
        return Report(**json.loads(text)) if text else None

    def publish(self, report: Report) -> Report:
        """Make `report` the first failure unless there is one already; returns the first."""
        return Report(**json.loads(self.set_once("failure", json.dumps(asdict(report)))))

    def bounded(self, question: Callable[[], T]) -> T | None:
        """The answer to a question to this board; None from the first time on that it takes ANSWER_SECONDS.

        The store itself would wait without end for a rank 0 whose process is stopped.
        """
        if self.silent:
            return None
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except dist.DistError as error:  # a broken connection
                answer.set_exception(error)

        threading.Thread(target=ask, name="question", daemon=True).start()
        try:
            return answer.result(ANSWER_SECONDS)
        except (TimeoutError, dist.DistError):
            self.silent = True
            return None


def describe(statuses: Mapping[int, Mapping[str, Any]], ranks: Iterable[int]) -> str:
    """`rank 2 (node1, pid 4242, last at: step 17)`, for each of `ranks`."""
    return ", ".join(
        f"rank {rank} ({status['host']}, pid {status['pid']}, last at: {status['doing']})"
        if (status := statuses.get(rank))
        else f"rank {rank}"
        for rank in ranks
    )


def listens(host: str, port: int) -> bool | None:
    """True if a process listens at a port, False if none does; None if the machine does not answer."""
    try:
        with socket.create_connection((host, port), ANSWER_SECONDS):
            return True
    except OSError as error:
        return False if isinstance(error, ConnectionRefusedError) or host == socket.gethostname() else None


def end_unless_called_again(seconds: float) -> None:
    """End this process by SIGALRM unless this is called again in time. 0 takes the last call back.

    That needs no thread of Python, which would wait for the interpreter's lock. After a suspension an alarm is overdue:
    so the first one only calls alarm(SIGALRM), and the next, which has no handler any more, comes 14 seconds later.
    """
    library = ctypes.CDLL(None)
    library.sysv_signal(int(signal.SIGALRM), library.alarm)  # a handler for one signal: signal(2), System V semantics
    signal.setitimer(signal.ITIMER_REAL, seconds)


class Heartbeat:
    """Progress of a rank's main thread.

    peak_memory_bytes: on rank 0, of all ranks, by the last statuses.
    """

    def __init__(self) -> None:
        self.count, self.doing, self.step = 0, "starting", 0
        self.peak_memory_bytes: dict[str, int] = {}

    def beat(self, doing: str, step: int | None = None) -> None:
        """Count progress; `doing` is the work that begins now."""
        self.count += 1
        self.doing = doing
        if step is not None:
            self.step = step


class Watchdog:
    """Two threads: one exchanges statuses with the other ranks, the other counts the time without progress.

    Time is counted in ticks that this process has run through, so that a job suspended as a whole (scontrol suspend,
    SIGSTOP) has not hung when it resumes.

    Args:
        limit_seconds: without progress of any rank for this long the run hangs. Ranks wait for each other after every
            step, so one that is stuck stops them all.
        end: called, from a thread of this class, with the report that ends this rank. It does not return.
    """

    def __init__(self, board: RankBoard, heart: Heartbeat, limit_seconds: float, end: Callable[[Report], None]) -> None:
        self.board, self.heart, self.end = board, heart, end
        self.limit = max(2, round(limit_seconds / TICK_SECONDS))
        self._statuses: dict[int, dict[str, Any]] = {}  # on rank 0 only
        self._progress = ""  # sum of all ranks' counts
        self._failure: Report | None = None
        # Ticks since there was progress, since the connection to rank 0 broke, and since a failure was reported.
        self._idle, self._broken, self._failed = 0, 0, 0
        # On rank 0: ticks since each rank's last new status, and since its process was found to be gone.
        self._still: Counter[int] = Counter()
        self._gone: Counter[int] = Counter()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]

    def start(self) -> Watchdog:
        """Begin to watch."""
        # At once, so that the status of a rank that is killed while the process group is set up is known.
        with contextlib.suppress(dist.DistError):
            self.exchange()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stop watching: the rest of the attempt has no time limit."""
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * TICK_SECONDS)

    def _exchange(self) -> None:
        try:
            while not self._stopped.wait(TICK_SECONDS):
                self.exchange()
        except dist.DistError:
            self._broken = 1

    def exchange(self) -> None:
        """Post this rank's status, and read the progress and the failure of the others.

        Raises:
            DistError: rank 0, which serves the store, is gone.
        """
        heart, space = self.heart, "?"
        with contextlib.suppress(OSError):
            space = str(Path("/proc/self/ns/pid").readlink())  # pid_namespaces(7)
        own = {"host": socket.gethostname(), "space": space, "pid": os.getpid(), "time": time.monotonic()}
        self.board.post(**own, count=heart.count, doing=heart.doing, step=heart.step, memory=peak_memory_bytes())
        if self.board.rank == 0:
            self._compare_statuses()
            heart.peak_memory_bytes = {str(rank): status.get("memory", 0) for rank, status in self._statuses.items()}
            self.board.set("progress", str(sum(status["count"] for status in self._statuses.values())))
        self._failure = self.board.failure()
        progress = self.board.get("progress") or str(heart.count)
        if progress != self._progress:
            self._idle, self._progress = 0, progress

    def _compare_statuses(self) -> None:
        before, self._statuses = self._statuses, self.board.statuses()
        here = self._statuses[0]
        for rank, status in self._statuses.items():
            same_machine = (status["host"], status["space"]) == (here["host"], here["space"])
            dead = same_machine and not is_running(status["pid"])
            self._still[rank] = (self._still[rank] + 1) * (status == before.get(rank))
            self._gone[rank] = (self._gone[rank] + 1) * dead

    def _watch(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            end_unless_called_again(2 * self.limit * TICK_SECONDS + LAST_RESORT_SECONDS)
            report = self.tick()
            if report is not None:
                self.end(report)
        end_unless_called_again(0)

    def tick(self) -> Report | None:
        """Count one tick; returns the report that ends this rank, if it has to end."""
        self._idle += 1
        self._broken += self._broken > 0
        self._failed += self._failure is not None
        if self._failure is not None:
            # The main thread notices a failure elsewhere by itself, unless it is stuck.
            return self._failure if self._failure.cause == "hang" or self._failed > PATIENCE_TICKS else None
        if self._broken > PATIENCE_TICKS:
            return self._report("lost", "rank 0 is gone: its process was killed, or its node was lost")
        look = self._idle % SILENT_TICKS == 0
        lost = [
            rank
            for rank, status in self._statuses.items()
            if self._gone[rank] > PATIENCE_TICKS
            or (look and self._still[rank] > SILENT_TICKS // 2 and listens(status["host"], DISCARD_PORT) is None)
        ]
        if lost and self._idle > PATIENCE_TICKS:
            return self._report("lost", f"{describe(self._statuses, lost)}: gone. Killed, or the node was lost")
        # Rank 0 sees all ranks and decides; another one does only if rank 0 is the one that is stuck.
        if self._idle > self.limit + (2 * PATIENCE_TICKS if self.board.rank else 0):
            return self._report("hang", self._hang())
        return None

    def _hang(self) -> str:
        minutes = self._idle * TICK_SECONDS / 60
        text = f"no rank has made any progress for {minutes:.1f} min (train.watchdog_minutes)"
        if self.board.rank:
            return f"{text}, and rank 0 does not answer; here rank {self.board.rank} was at: {self.heart.doing}"
        stopped = [rank for rank, ticks in self._still.items() if ticks > self.limit // 2]
        if stopped:
            return f"{text}; stopped or without a network: {describe(self._statuses, stopped)}"
        least = min(status["count"] for status in self._statuses.values())
        slowest = [rank for rank, status in self._statuses.items() if status["count"] == least]
        return f"{text}; the furthest behind: {describe(self._statuses, slowest)}"

    def _report(self, cause: str, text: str) -> Report:
        host, summary = socket.gethostname(), text.partition(":")[0]
        return Report(self.board.rank, host, cause, summary, text, self.heart.step, retryable=True)


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
