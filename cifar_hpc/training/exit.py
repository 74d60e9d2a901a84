"""End of an attempt that finished, was stopped or failed: logs, and the requeue if there is one."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cifar_hpc.config import user_code
from cifar_hpc.errors import RanksLostError, RunBusyError, SchedulerError, UserError
from cifar_hpc.files import make_again
from cifar_hpc.runs import requeue
from cifar_hpc.runs.events import FAILURES, STARTS, Failed, Finished, Hang, Holding, Left, Signal
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import append_line, read_jsonl, utc_now, write_rest
from cifar_hpc.runs.requeue import Decision, Ending
from cifar_hpc.slurm.client import allow_fewer_nodes, end_step, forbid_requeue
from cifar_hpc.text import counted, printable
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.watchdog import RankBoard, Report, describe, stacks
from cifar_hpc.training.network_check import NOT_DETERMINISTIC
from cifar_hpc.training.process import is_running, siblings
from cifar_hpc.training.trainer import Position

# submitit's local controller starts the tasks again when one exits with this (submitit.local.local).
LOCAL_REQUEUE_STATUS = 144
# How long a process waits for Slurm to end it, if it could not ask for a requeue itself.
HOLD_SECONDS = 3600
# Time in which the other ranks leave the report to rank 0, and in which processes may end by themselves.
RANK_0_SECONDS = 10.0
# Time in which the other ranks show that they have noticed the failure.
LAST_WORDS_SECONDS = 3.0
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
# Contact with another rank, in the words of gloo, NCCL and the system.
_LOST = (
    "Connection closed by", "Connection reset by peer", "Connection refused", "Connection timed out", "Broken pipe",
    "No route to host", "gloo/transport/tcp/pair", "gloo/transport/tcp/unbound_buffer", "ncclRemoteError",
)  # fmt: skip
# Two ranks on one GPU, for example.
_MISUSE = ("ncclInvalidUsage", "ncclInvalidArgument")
_HEADS = {"hang": "HUNG", "out_of_memory": "OUT OF MEMORY"}


def finished(context: Context, position: Position | None) -> None:
    """Log the end of the last epoch, and let the job end for good.

    Args:
        position: None if an earlier attempt has finished the run.
    """
    if position is None:
        context.log.line("the run has finished before: nothing to do. HINT: a larger train.epochs goes on from here")
    else:
        last, best = position.history[-1], position.best
        words = f"{counted(position.epoch, 'epoch')}: test {last['test_accuracy']:.2f}% "
        words += f"(best {best['test_accuracy']:.2f}% at epoch {best['epoch']})"
        context.log.line(f"FINISHED {words}")
        context.emit(Finished(step=position.step, epoch=position.epoch, test_accuracy=last["test_accuracy"], best=best))
        write_rest(requeue.PATIENCE_SECONDS, requeue.ASK_AGAIN_SECONDS)  # the run must be known to have finished
    if context.launch.scheduler == "slurm" and context.log.enabled:
        forbid_requeue(context.launch.job_id or "")
    if position is not None and context.log.enabled:
        requeue.notify(context.paths, context.spec, "finished", words, context.log)


def stopped(context: Context, position: Position | None, stored: bool) -> int:
    """Log a stop by a signal and requeue the run if that is the decision; returns the exit status.

    Args:
        stored: whether a checkpoint of `position` is on disk.
    """
    _log_stop(context, position, stored)
    launch, received = context.launch, context.stop.signal
    if launch.scheduler is not None and not context.log.enabled:
        return 0  # any other status could make srun kill rank 0 before it has requeued, or the executor restart the job
    ending = Ending("signal", launch.scheduler, received)
    deadline = time.monotonic() + HOLD_SECONDS
    held = ""
    while True:
        decision = decide_now(context, ending, quiet=bool(held))
        if decision.action == "requeue":
            asked = ending.refused is not None
            if not asked:
                context.log.line(decision.explanation)
            try:
                return restart(context, decision, recorded=asked, again=True)
            except SchedulerError as refusal:
                ending = replace(ending, refused=str(refusal) if requeue.refused_for_good(refusal) else "")
                if ending.refused:
                    continue
                decision = replace(decision, action="hold", explanation=f"{refusal}; holding still, and asking again")
        leaves = decision.action == "leave"
        if leaves or decision.explanation != held:
            context.log.line(decision.explanation)
            event = Left if leaves else Holding
            context.emit(event(reason=decision.reason, explanation=decision.explanation))
        if leaves or time.monotonic() > deadline:
            break
        # To leave without a requeue would end the job for good; a controller that is down may be back in time.
        held = decision.explanation
        time.sleep(requeue.ASK_AGAIN_SECONDS)
    if launch.scheduler != "slurm":
        return 128 + (received or signal.SIGTERM)
    if leaves and decision.reason == "timeout":  # else Slurm or a person has decided
        forbid_requeue(launch.job_id or "")
        requeue.notify(context.paths, context.spec, "stopped", decision.explanation, context.log)
    allow_fewer_nodes(launch.job_id or "", context.spec.resources.fewest_tasks)
    return 1


def _log_stop(context: Context, position: Position | None, stored: bool) -> None:
    stop = context.stop
    name = stop.signal.name if stop.signal else "another rank's signal"
    seconds = round(stop.seconds, 3) if stop.seconds is not None else None
    step, epoch = (position.step, position.epoch) if position else (None, None)
    context.emit(Signal(signal=name, seconds=seconds, step=step, epoch=epoch))
    at = f"step {step} is {'' if stored else 'NOT '}on disk" + (
        f" after {seconds:.1f} s" if seconds is not None else ""
    )
    context.log.line(f"STOPPED by {name}: {at if position else 'nothing was computed yet'}")
    if position is not None and not stored:
        context.log.warn("the next start goes on from an older checkpoint")


def decide_now(context: Context, ending: Ending, quiet: bool = False) -> Decision:
    """The decision on a requeue, by the run's events and the job's state.

    Args:
        quiet: do not log that Slurm does not answer.
    """
    job = None
    if ending.scheduler == "slurm":
        warn = (lambda text: None) if quiet else context.log.warn
        patience = 0.0 if ending.cause in ("signal", "busy") else requeue.PATIENCE_SECONDS
        job = requeue.ask_about(context.launch.job_id or "", warn, patience)
    decision = requeue.decide(ending, context.spec, History.read(context.paths.events), job, datetime.now(UTC))
    return requeue.elsewhere(decision, ending, context.spec, context.launch.job_id or "")


def restart(context: Context, decision: Decision, recorded: bool = False, again: bool = False) -> int:
    """Have the run started again; returns the exit status to end with.

    Args:
        recorded, again: as `request_requeue`.

    Raises:
        SchedulerError: Slurm refused.
    """
    if context.launch.scheduler == "slurm":
        requeue.request_requeue(context.launch.job_id or "", decision, context.spec, context.emit, recorded, again)
        return 0
    context.emit(decision.event())
    end = time.monotonic() + decision.delay_seconds
    while time.monotonic() < end and not context.stop.requested:
        time.sleep(0.1)
    if context.stop.signal is signal.SIGTERM:
        left = decide_now(context, Ending("signal", context.launch.scheduler, signal.SIGTERM))
        context.log.line(left.explanation)
        context.emit(Left(reason=left.reason, explanation=left.explanation))
        return 128 + signal.SIGTERM
    return LOCAL_REQUEUE_STATUS


def report_of(error: BaseException, context: Context) -> Report:
    """The report of an exception on this rank."""
    words = str(error)
    first, _, others = words.partition("\n")
    if "NCCL error in" in first and others:  # it says where, and the others why
        first = " ".join(others.split())
    summary = f"{type(error).__name__}: {first}"[:500]
    cause, text, retryable, status = "error", "".join(traceback.format_exception(error)), True, 1
    if isinstance(error, UserError):
        text, retryable, status = words, error.retryable, error.exit_code
        cause = "lost" if isinstance(error, RanksLostError) else "error"
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in words for w in _OUT_OF_MEMORY):
        cause, text = "out_of_memory", f"{_memory_advice(context)}\n{text}"
    elif isinstance(error, RuntimeError) and any(w in words for w in _MISUSE):
        retryable = False
    elif isinstance(error, RuntimeError) and NOT_DETERMINISTIC in words:
        text, retryable = f"{words} HINT: use another layer, or start a new run with train.deterministic: false.", False
    elif isinstance(error, RuntimeError) and (
        any(w in words for w in _LOST) or (isinstance(error, dist.DistError) and "NCCL error" not in words)
    ):
        cause, text = "lost", f"lost contact with another rank ({type(error).__name__}: {words})"  # no traceback
    elif line := user_code.line_of(error, context.paths.user_code):
        error.__traceback__ = user_code.frames_of(error, context.paths.user_code)
        summary, text = f"{line}: {summary}"[:500], f"{line}\n{''.join(traceback.format_exception(error))}"
    rank, host = context.launch.rank, socket.gethostname()
    bad_node = requeue.broken_node(words, os.environ.get("SLURMD_NODENAME")) if cause == "error" else ""
    step, retryable = context.heart.step, retryable or bool(bad_node)
    return Report(rank, host, cause, summary, text.rstrip(), step, retryable, status, bad_node)


def _memory_advice(context: Context) -> str:
    where, other = "the node's memory", "ask for more with --mem"
    if torch.cuda.is_initialized():
        where, other = "the GPU's memory", "see with nvidia-smi whether another process uses the GPU"
        with suppress(RuntimeError):  # CUDA may not work any more
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
            where = f"that of {torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"
    return (
        f"{where}. HINT: lower train.batch_size, or spread the train.shards ({context.spec.train.shards}) over more "
        f"ranks, or {other}."
    )


class FailureReporter:
    """Reports a failed attempt once, whichever rank and thread comes first, and acts on the decision on a requeue."""

    def __init__(self, context: Context, position: Callable[[], Position | None] = lambda: None) -> None:
        self.context, self.position = context, position
        self.board = RankBoard(None, context.launch.rank, context.launch.world_size)
        self._attempt = f"{os.getpid()}-{time.time_ns()}"  # the same on all ranks once they have met
        self._began = utc_now()
        self._met = False
        self._reporting = threading.Lock()

    def meet(self, store: dist.Store | None) -> RankBoard:
        """Share failures with the other ranks through the store in which they have met."""
        self.board = RankBoard(store, self.board.rank, self.board.world_size)
        if self.context.first:
            self.board.set("attempt", self._attempt)
        self._attempt = self.board.wait("attempt")
        self._met = True
        return self.board

    def from_watchdog(self, report: Report) -> None:
        """End this process with `report`, unless its main thread is already reporting."""
        if self._reporting.acquire(blocking=False):
            os._exit(self._report(report))

    def report(self, error: Exception) -> int:
        """Report an exception of this rank; returns the exit status."""
        report = report_of(error, self.context)
        brief = isinstance(error, UserError) or self.context.stop.requested or report.cause == "lost"
        with suppress(OSError):  # srun, which reads this, may have gone with its node
            print(printable(f"error: {error if brief else report.text}"), file=sys.stderr, flush=True)
        if isinstance(error, UserError) and error.everywhere and not self.context.first:
            return error.exit_code
        if not self._reporting.acquire(blocking=False):
            threading.Event().wait()  # the watchdog is reporting, and ends the process
        return self._requeue_busy(error) if isinstance(error, RunBusyError) else self._report(report)

    def _requeue_busy(self, error: RunBusyError) -> int:
        """Come back later, if there is a queue to wait in: another process holds the run and writes its logs.

        A lost node can hold its lock on a network file system for long after Slurm has requeued the job.
        """
        if self.context.launch.scheduler == "slurm":
            decision = decide_now(self.context, Ending("busy"), quiet=True)
            if decision.action == "requeue":
                with suppress(SchedulerError):
                    restart(self.context, replace(decision, explanation=str(error)))
        return error.exit_code

    def _report(self, mine: Report) -> int:
        context, board = self.context, self.board
        if context.launch.world_size > 1 and (status := self._status_if_over(mine)) is not None:
            return status
        if mine.cause == "hang":
            where = f"rank {board.rank} ({socket.gethostname()}, pid {os.getpid()})"
            dump = f"---- stacks of {where}\n{stacks().rstrip()}\n---- end of stacks of {where}"
            append_line(context.paths.train_log, dump)
        first = board.bounded(lambda: board.publish(mine)) or mine
        board.bounded(lambda: board.set(f"over/{board.rank}"))
        if not self._claim():
            return mine.status if context.stop.signal is None else 128 + context.stop.signal
        context.log.enabled = True
        missing = self._missing_ranks() if first.cause in ("lost", "hang") else ""
        if first.cause == "lost" and context.stop.requested:
            # While a job is being ended its ranks may go one by one. No step was agreed on, so nothing is saved.
            return stopped(context, self.position(), stored=False)
        ending = Ending(
            first.cause, context.launch.scheduler, step=first.step, retryable=first.retryable, bad_node=first.bad_node
        )
        decision = decide_now(context, ending)
        if decision.action == "leave":
            context.log.line(decision.explanation)
            return first.status
        self._log(first, missing if first.cause == "lost" else "", decision)
        return self._act(first, decision, missing or first.summary)

    def _status_if_over(self, mine: Report) -> int | None:
        """The exit status if other ranks have already ended this attempt, by events.jsonl."""
        events = read_jsonl(self.context.paths.events)
        if [e["event"] for e in events if e.get("event") in (*STARTS, Finished.name)][-1:] == [Finished.name]:
            return mine.status
        since = {e.get("event") for e in events if str(e.get("time")) >= self._began}
        if mine.cause == "lost" and Signal.name in since:
            return 128 + signal.SIGTERM  # they were stopped, and are gone
        return mine.status if not self._met and since & set(FAILURES) else None

    def _claim(self) -> bool:
        """True if this rank is to report: rank 0, or if that is gone, the first to create a file.

        The store could not decide that, since it is gone with rank 0.
        """
        folder = self.context.paths.slurm / "rendezvous"
        claim = folder / f"{self._attempt}.spoken"
        end = time.monotonic() + (0.0 if self.context.first or self.board.silent else RANK_0_SECONDS)
        while not claim.exists() and time.monotonic() < end:
            time.sleep(0.05)
        try:
            make_again(self.context.paths.root, folder)
            claim.touch(0o644, exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return self.context.first  # a folder that is gone or full
        return True

    def _missing_ranks(self) -> str:
        """A sentence about the ranks that ended without a report; empty if there are none."""
        board = self.board
        before = board.bounded(board.statuses) or {}
        end = time.monotonic() + LAST_WORDS_SECONDS  # the others' own reports, and their stacks, come first
        while (silent := board.bounded(self._silent_ranks)) and time.monotonic() < end:
            time.sleep(0.1)
        statuses = board.bounded(board.statuses) or {}
        # A rank whose status still changes is alive, and has only not noticed the failure yet. Without one it has never
        # come up, which the report itself says.
        gone = [0] if silent is None else [r for r in silent if r in statuses and statuses[r] == before.get(r)]
        if not gone:
            return ""
        return f"no word from {describe(statuses, gone)}: killed (out of memory? see --mem), or its node was lost"

    def _silent_ranks(self) -> list[int]:
        board = self.board
        return [rank for rank in range(board.world_size) if rank != board.rank and board.get(f"over/{rank}") is None]

    def _log(self, report: Report, missing: str, decision: Decision) -> None:
        context = self.context
        event = Hang if report.cause == "hang" else Failed
        error, again = missing or report.summary, decision.action == "requeue"
        who: dict[str, Any] = {"cause": report.cause, "rank": report.rank, "rank_host": report.host}
        who |= {"bad_node": report.bad_node or None}
        context.emit(event(step=report.step, error=error, again=again, **who))
        # The reason comes last in the log, where a `tail` shows it.
        context.log.line(decision.explanation)
        head, reason = _HEADS.get(report.cause, "FAILED"), f"{report.text}\n{missing}".rstrip()
        context.log.line(f"{head} on rank {report.rank} ({report.host}): {reason}")

    def _act(self, report: Report, decision: Decision, error: str) -> int:
        context = self.context
        try:
            if context.launch.scheduler == "local":
                _end_other_ranks()
            if decision.action == "requeue":
                return restart(context, decision)
        except SchedulerError as refusal:
            context.log.warn(str(refusal))
        requeue.notify(context.paths, context.spec, "failed", error, context.log)
        if context.launch.scheduler == "slurm":
            requeue.end_for_good(context.launch.job_id or "", History.read(context.paths.events))
            if report.cause == "hang":  # a rank that is stuck would hold the nodes until the time limit
                with suppress(SchedulerError):
                    end_step(context.launch.job_id or "")
        return report.status


def _end_other_ranks() -> None:
    """End the other ranks under the local executor, which waits for all; one that is stuck would block it.

    All are children of its controller; once that is gone, nothing waits. Those that are not stuck have time to end by
    themselves.
    """
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        parent = b""
    if b"submitit.local" not in parent:
        return
    end = time.monotonic() + RANK_0_SECONDS
    while (left := [pid for pid in siblings() if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
