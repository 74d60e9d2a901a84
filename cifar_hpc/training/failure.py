"""How a start of a run fails: one rank says why, once, and asks for another try where that may help."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cifar_hpc.errors import RanksLostError, RunBusyError, SchedulerError, UserError
from cifar_hpc.runs.events import count_requeues, since_submission
from cifar_hpc.runs.lock import read_owner
from cifar_hpc.runs.logs import append_line, read_jsonl, utc_now
from cifar_hpc.runs.requeue import ALIVE, FIRST_DELAY_SECONDS, Retry, decide_retry
from cifar_hpc.slurm import client as slurm
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.rank_board import Board, NoAnswerError, Report, bounded
from cifar_hpc.training.distributed.rank_board import describe as describe_ranks
from cifar_hpc.training.distributed.watchdog import stacks
from cifar_hpc.training.exit import LOCAL_REQUEUE_STATUS, stopped
from cifar_hpc.training.trainer import Position

T = TypeVar("T")
# How long the other ranks leave it to rank 0 to speak for the run.
RANK_0_SECONDS = 10.0
# How long the speaker waits to see which ranks are there no more.
LAST_WORDS_SECONDS = 3.0
# Without a scheduler's queue the machine is ours, and only what passes by itself needs waiting for.
LOCAL_DELAY_SECONDS = 2
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "gloo/transport")


def report_of(error: BaseException, context: Context) -> Report:
    """The report of an exception on this rank."""
    rank, host = context.launch.rank, socket.gethostname()
    words = str(error)
    summary = f"{type(error).__name__}: {words}".splitlines()[0][:500]
    cause, text, again, status = "error", "".join(traceback.format_exception(error)), True, 1
    if isinstance(error, UserError):
        text, again, status = words, error.again, error.exit_code
        cause = "lost" if isinstance(error, RanksLostError) else "error"
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in words for w in _OUT_OF_MEMORY):
        cause, text = "out_of_memory", f"{_memory_words(context)}\n{text}"
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in words for w in _LOST)):
        cause, text = "lost", f"lost contact with another rank ({summary})"  # where this rank was says nothing
    return Report(rank, host, cause, summary, text.rstrip(), context.heart.step, again, status)


def _memory_words(context: Context) -> str:
    where, other = "the node's memory", "ask for more with --mem"
    if torch.cuda.is_initialized():
        where, other = "the GPU's memory", "see with nvidia-smi whether another process uses the GPU"
        with suppress(RuntimeError):  # CUDA may answer nothing any more
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
            where = f"that of {torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"
    return (
        f"{where}. HINT: lower train.batch_size, or spread the train.shards ({context.spec.train.shards}) over more "
        f"processes, or {other}."
    )


class LastWords:
    """What a start that fails says and asks for: once a run, whichever rank and thread comes to it first."""

    def __init__(self, context: Context, position: Callable[[], Position | None] = lambda: None) -> None:
        self.context, self.position = context, position
        self.board = Board(None, context.launch.rank, context.launch.world_size)
        # The name of this start, the same on all ranks once they have met.
        self.token = f"{os.getpid()}-{time.time_ns()}"
        self._began = utc_now()
        self.met = False  # whether `board` leads to the others
        self._deaf = False  # whether the store, and so rank 0, has stopped answering
        self._busy = threading.Lock()

    def from_watchdog(self, report: Report) -> None:
        """End this process with `report`, unless its main thread is already at it."""
        if self._busy.acquire(blocking=False):
            os._exit(self._say(report))

    def of(self, error: Exception) -> int:
        """Say why this rank ends; returns the exit status."""
        report = report_of(error, self.context)
        brief = isinstance(error, UserError) or self.context.stop.requested or report.cause == "lost"
        words = str(error) if brief else "".join(traceback.format_exception(error)).rstrip()
        with suppress(OSError):  # srun, which reads this, may have gone with its node
            print(f"error: {words}", file=sys.stderr, flush=True)
        if isinstance(error, UserError) and error.everywhere and not self.context.first:
            return error.exit_code
        if not self._busy.acquire(blocking=False):
            threading.Event().wait()  # the watchdog is at it, and ends the process
        if isinstance(error, RunBusyError):
            return self._busy_elsewhere(error)
        return self._say(report)

    def _say(self, mine: Report) -> int:
        context = self.context
        if self.context.launch.world_size > 1 and (status := self._over(mine)) is not None:
            return status
        if mine.cause == "hang":
            self._dump_stacks()
        first = self._ask(lambda: self.board.publish(mine), mine)
        self._ask(lambda: self.board.tell(f"over/{context.launch.rank}", ""), None)
        # Where rank 0 is gone somebody else has to speak.
        if not self._may_speak(0.0 if context.first or self._deaf else RANK_0_SECONDS):
            return mine.status if context.stop.signal is None else 128 + context.stop.signal
        context.speak()
        return self._speak(first, self._missing(first))

    def _ask(self, question: Callable[[], T], default: T) -> T:
        """The store's answer, or `default` from the first time on that it does not answer."""
        if not self._deaf:
            try:
                return bounded(question)
            except NoAnswerError:
                self._deaf = True
        return default

    def _missing(self, report: Report) -> str:
        """Who the ranks are that ended without a word, where that is why this start fails."""
        silent = [r for r in range(self.context.launch.world_size) if r != self.context.launch.rank]
        before: dict[int, dict[str, Any]] = self._ask(self.board.look, {})
        end = time.monotonic() + LAST_WORDS_SECONDS  # the others' own words, and their stacks, come first
        while silent and report.cause in ("lost", "hang") and not self._deaf and time.monotonic() < end:
            silent = [r for r in silent if self._ask(lambda r=r: self.board.ask(f"over/{r}"), None) is None]  # type: ignore[misc]
            time.sleep(0.1)
        shown: dict[int, dict[str, Any]] = self._ask(self.board.look, {})
        # One that still shows signs of life has only not heard of it yet.
        gone = [0] if self._deaf else [rank for rank in silent if shown.get(rank) == before.get(rank)]
        if report.cause != "lost" or not gone:
            return ""
        return f"no word from {describe_ranks(shown, gone)}: killed (out of memory? see --mem), or its node was lost"

    def _busy_elsewhere(self, error: RunBusyError) -> int:
        """Another process holds the run, whose logs are its own: come back later, where there is a queue to wait in.

        A lost node can hold its lock on a network file system for long after Slurm has requeued the job.
        """
        context = self.context
        events = since_submission(read_jsonl(context.paths.events))
        used = count_requeues(events).get("failure", 0)
        can = context.launch.scheduler == "slurm" and context.spec.resources.requeue
        if can and used < context.spec.failures.max:
            context.emit("requeued", reason="failure", explanation=str(error))
            with suppress(SchedulerError):
                fewest = context.spec.resources.fewest_tasks
                slurm.requeue(context.launch.job_id or "", FIRST_DELAY_SECONDS << (used + 1), fewest)
        return error.exit_code

    def _dump_stacks(self) -> None:
        lines = stacks().rstrip()
        where = f"rank {self.context.launch.rank} ({socket.gethostname()}, pid {os.getpid()})"
        append_line(self.context.paths.train_log, f"---- stacks of {where}\n{lines}\n---- end of stacks of {where}")

    def _may_speak(self, patience_seconds: float) -> bool:
        """Whether this rank is the one; decided by who creates a file, since the store dies with rank 0."""
        folder = self.context.paths.slurm / "rendezvous"
        claim = folder / f"{self.token}.spoken"
        end = time.monotonic() + patience_seconds
        while not claim.exists() and time.monotonic() < end:
            time.sleep(0.05)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError:
            return self.context.first  # a folder that is gone or full
        return True

    def _speak(self, report: Report, missing: str) -> int:
        context = self.context
        if report.cause == "lost" and context.stop.requested:
            # While a job is being ended its ranks may go one by one. No step was agreed on, so nothing is saved.
            return stopped(context, self.position(), stored=False)
        if report.cause == "lost" and (state := self._ending()) is not None:
            context.log.line(f"JobState={state}: the job is being ended, and another rank was faster")
            return report.status
        retry = self._retry(report)
        reason = f"{report.text}\n{missing}" if missing else report.text
        head = {"hang": "HUNG", "out_of_memory": "OUT OF MEMORY"}.get(report.cause, "FAILED")
        context.emit(
            "hang" if report.cause == "hang" else "failed",
            step=report.step,
            error=missing or report.summary,
            cause=report.cause,
            rank=report.rank,
            rank_host=report.host,
            again=retry.again,
        )
        # The reason stands last in the log, where a `tail` shows it.
        context.log.line(retry.explanation)
        append_line(
            context.paths.train_log,
            f"{datetime.now():%Y-%m-%d %H:%M:%S} {head} on rank {report.rank} ({report.host}): {reason}",
        )
        return self._act(report, retry)

    def _over(self, mine: Report) -> int | None:
        """The exit status where others have already said how this start ends, as events.jsonl tells."""
        events = read_jsonl(self.context.paths.events)
        if [e["event"] for e in events if e.get("event") in ("started", "resumed", "finished")][-1:] == ["finished"]:
            return mine.status
        since = {e.get("event") for e in events if str(e.get("time")) >= self._began}
        if mine.cause == "lost" and "signal" in since:
            return 128 + signal.SIGTERM  # they were told to stop, and have gone
        return mine.status if not self.met and since & {"failed", "hang"} else None

    def _ending(self) -> str | None:
        """The JobState of a job that is being ended: that its ranks go one by one is no failure then."""
        if self.context.launch.scheduler != "slurm":
            return None
        with suppress(SchedulerError):
            state = slurm.job_fields(self.context.launch.job_id or "").get("JobState", "")
            return None if state in ALIVE else state
        return None

    def _retry(self, report: Report) -> Retry:
        context = self.context
        events = since_submission(read_jsonl(context.paths.events))
        can = context.launch.scheduler is not None and context.spec.resources.requeue
        retry = decide_retry(events, report.step, context.spec.failures.max, can, report.again)
        if retry.again and context.launch.scheduler == "slurm":
            try:
                state = slurm.job_fields(context.launch.job_id or "").get("JobState")
                if state not in ALIVE:
                    return Retry(False, 0, f"not requeued: JobState={state}")
            except SchedulerError as refusal:
                return Retry(False, 0, f"WARNING not requeued: {refusal}")
        return retry

    def _act(self, report: Report, retry: Retry) -> int:
        context = self.context
        job = context.launch.job_id or ""
        if context.launch.scheduler == "local":
            _kill(self._others_here())
            if retry.again:
                context.emit("requeued", reason="failure")
                time.sleep(retry.delay_seconds / FIRST_DELAY_SECONDS * LOCAL_DELAY_SECONDS)
                return LOCAL_REQUEUE_STATUS
        elif context.launch.scheduler == "slurm":
            try:
                if retry.again:
                    context.emit("requeued", reason="failure", delay_seconds=retry.delay_seconds)
                    slurm.requeue(job, retry.delay_seconds, context.spec.resources.fewest_tasks)
                    return 0
                if report.cause == "hang":
                    slurm.end_step(job)  # a rank that is stuck would hold the nodes until the time limit
            except SchedulerError as refusal:
                context.log.line(f"WARNING {refusal}")
        return report.status

    def _others_here(self) -> list[int]:
        """Process ids of the other ranks on this machine, as far as they are known."""
        owner = read_owner(self.context.paths.lock)
        if self._deaf:
            return [owner["pid"]] if owner.get("host") == socket.gethostname() and not self.context.first else []
        shown: dict[int, dict[str, Any]] = self._ask(self.board.look, {})
        mine = shown.get(self.board.rank, {})
        place = (mine.get("host"), mine.get("space"))
        return [s["pid"] for r, s in shown.items() if r != self.board.rank and (s.get("host"), s.get("space")) == place]


def _kill(pids: Sequence[int]) -> None:
    """End processes that may be stuck, after those that are not had time to end by themselves."""
    end = time.monotonic() + RANK_0_SECONDS
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
