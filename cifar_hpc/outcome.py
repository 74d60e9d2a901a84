"""How a start of a run ends: finished, stopped on request, or failed; and what is asked of Slurm then."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import datetime

from cifar_hpc import slurm
from cifar_hpc.context import Context
from cifar_hpc.errors import RunBusyError, SchedulerError, UserError
from cifar_hpc.preemption import ALIVE, Decision, decide
from cifar_hpc.runlog import append_line, count_requeues, read_jsonl, since_submission
from cifar_hpc.trainer import Position

# submitit's local controller starts the tasks again when one exits with this (submitit.local.local).
LOCAL_REQUEUE_STATUS = 144
# That controller does so at most this often (submitit.local.local, Controller.run).
LOCAL_REQUEUES = 5
# How long a process holds still for Slurm to end it, where it could not ask for a requeue itself.
HOLD_SECONDS = 3600


def finished(context: Context, position: Position | None) -> None:
    """The last epoch is on disk."""
    assert position is not None
    last, best = position.history[-1], position.best
    context.log.line(
        f"FINISHED {position.epoch} epochs, {position.step} steps: test accuracy {last['test_accuracy']:.2f}% "
        f"(best {best['test_accuracy']:.2f}% at epoch {best['epoch']})"
    )
    context.emit("finished", step=position.step, epoch=position.epoch, test_accuracy=last["test_accuracy"], best=best)


def stopped(context: Context, position: Position | None, stored: bool) -> int:
    """Told to stop; `stored` says whether the position is on disk. Returns the exit status."""
    received = context.stop.signal
    name = received.name if received else "another rank's signal"
    context.emit("signal", signal=name, **({"step": position.step, "epoch": position.epoch} if position else {}))
    at = "nothing had been computed yet"
    if position is not None:
        at = f"step {position.step} " + (
            "is on disk" if stored else "is NOT on disk; the checkpoint before it has to do"
        )
    context.log.line(f"STOPPED by {name}: {at}")
    if context.launch.scheduler == "slurm":
        return _leave_slurm(context)
    if context.launch.scheduler == "local" and not context.first:
        return 0  # what rank 0 answers decides for all
    if context.launch.scheduler == "local" and name != "SIGTERM":
        if _requeues(context, "preemption") < LOCAL_REQUEUES:
            context.emit("requeued", reason="preemption")
            context.log.line("requeued: the local executor starts the run again")
            return LOCAL_REQUEUE_STATUS
        context.log.line(f"the local executor starts a job again {LOCAL_REQUEUES} times at most")
    context.log.line("not requeued; submit the same again to go on from here")
    context.emit("left", reason="stopped", explanation=f"{name} outside Slurm")
    return 128 + (received or 15)


def _leave_slurm(context: Context) -> int:
    if not context.first:
        return 0  # any other status could make srun kill rank 0 before it has requeued
    decision = _decide(context)
    if decision.action == "requeue":
        # Before the call: right after it Slurm kills this process.
        context.emit("requeued", reason=decision.reason)
        context.log.line(decision.explanation)
        try:
            slurm.requeue(context.launch.job_id or "")
            return 0
        except SchedulerError as error:
            context.emit("requeue_failed", reason=str(error))
            decision = Decision("hold", decision.reason, f"{error}; waiting for Slurm to end the job")
    context.log.line(decision.explanation)
    context.emit(
        "left" if decision.action == "leave" else "holding",
        reason=decision.reason,
        explanation=decision.explanation,
    )
    if decision.action == "hold":
        time.sleep(HOLD_SECONDS)
    return 1


def _decide(context: Context) -> Decision:
    fields: dict[str, str] | None = None
    for attempt in range(3):
        try:
            fields = slurm.job_fields(context.launch.job_id or "")
            break
        except SchedulerError as error:
            context.log.line(f"WARNING {error}")
            time.sleep(attempt)
    return decide(
        context.stop.signal,
        fields,
        now=datetime.now(),
        own_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        warning_seconds=context.spec.resources.warning_seconds,
        timeouts_left=context.spec.timeouts.max - _requeues(context, "timeout"),
        may_requeue=context.spec.resources.requeue,
    )


def failed(context: Context, error: Exception, text: str, position: Position | None, *, again: bool) -> int:
    """Say why. Requeue if trying again may help (`again`), and only while each try gets further than the last.

    Returns the exit status.
    """
    print(f"error: {text.rstrip()}", file=sys.stderr, flush=True)
    if isinstance(error, RunBusyError):
        return error.exit_code  # the logs belong to the process that holds the run
    if isinstance(error, UserError) and error.everywhere and not context.first:
        return error.exit_code
    where = f"rank {context.launch.rank} ({socket.gethostname()})"
    append_line(context.paths.train_log, f"{datetime.now():%Y-%m-%d %H:%M:%S} FAILED on {where}: {text.rstrip()}")
    if not context.first:
        time.sleep(5)  # rank 0 hears of it through its broken connection, and may want to requeue
        return 1
    step = position.step if position else 0
    earlier = [e for e in since_submission(read_jsonl(context.paths.events)) if e.get("event") == "failed"]
    progress = not earlier or step > int(earlier[-1].get("step") or 0)
    context.emit("failed", step=step, error=f"{type(error).__name__}: {error}".splitlines()[0][:500])
    if again and progress and context.launch.scheduler == "slurm" and context.spec.resources.requeue:
        _requeue_failure(context)
    return error.exit_code if isinstance(error, UserError) else 1


def _requeue_failure(context: Context) -> None:
    used, limit = _requeues(context, "failure"), context.spec.failures.max
    if used >= limit:
        context.log.line(f"not requeued: failures.max ({limit}) is used up; submit again to go on")
        return
    try:
        if slurm.job_fields(context.launch.job_id or "").get("JobState") in ALIVE:
            context.emit("requeued", reason="failure")
            context.log.line(f"requeueing after failure {used + 1} of at most {limit}")
            slurm.requeue(context.launch.job_id or "")
    except SchedulerError as refusal:
        context.log.line(f"WARNING not requeued: {refusal}")


def _requeues(context: Context, reason: str) -> int:
    return count_requeues(since_submission(read_jsonl(context.paths.events))).get(reason, 0)
