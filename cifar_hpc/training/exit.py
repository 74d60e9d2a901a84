"""How a start of a run ends: finished, or stopped on request; and what is asked of Slurm then."""

from __future__ import annotations

import os
import time
from datetime import datetime

from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs.events import count_requeues, since_submission
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.requeue import Decision, decide
from cifar_hpc.slurm import client as slurm
from cifar_hpc.training.context import Context
from cifar_hpc.training.trainer import Position

# submitit's local controller starts the tasks again when one exits with this (submitit.local.local).
LOCAL_REQUEUE_STATUS = 144
# That controller does so at most this often (submitit.local.local, Controller.run).
LOCAL_REQUEUES = 5
# How long a process holds still for Slurm to end it, where it could not ask for a requeue itself.
HOLD_SECONDS = 3600
ASK_AGAIN_SECONDS = 10


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
    seconds = round(context.stop.seconds, 3) if context.stop.seconds is not None else None
    here = {"step": position.step, "epoch": position.epoch} if position else {}
    context.emit("signal", signal=name, seconds=seconds, **here)
    at = "nothing had been computed yet"
    if position is not None:
        at = f"step {position.step} " + (
            "is on disk" if stored else "is NOT on disk; the checkpoint before it has to do"
        )
    after = f", {seconds:.1f} s after the signal" if seconds is not None else ""
    context.log.line(f"STOPPED by {name}: {at}{after}")
    if context.launch.scheduler == "slurm":
        return _leave_slurm(context)
    if context.launch.scheduler == "local" and not context.speaks:
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
    if not context.speaks:
        return 0  # any other status could make srun kill rank 0 before it has requeued
    deadline = time.monotonic() + HOLD_SECONDS
    held = ""
    while True:
        decision = _decide(context, held)
        if decision.action == "requeue":
            # Before the call: right after it Slurm kills this process.
            context.emit("requeued", reason=decision.reason)
            context.log.line(decision.explanation)
            try:
                slurm.requeue(context.launch.job_id or "", fewest_tasks=context.spec.resources.fewest_tasks)
                return 0
            except SchedulerError as error:
                context.emit("requeue_failed", reason=str(error))
                decision = Decision("hold", decision.reason, f"{error}; holding still, and asking again")
        if decision.action == "leave" or decision.explanation != held:
            context.log.line(decision.explanation)
            context.emit(
                "left" if decision.action == "leave" else "holding",
                reason=decision.reason,
                explanation=decision.explanation,
            )
        if decision.action == "leave" or time.monotonic() > deadline:
            slurm.allow_fewer_nodes(context.launch.job_id or "", context.spec.resources.fewest_tasks)
            return 1
        # To leave without a requeue would end the job for good; a controller that is down may be back in time.
        held = decision.explanation
        time.sleep(ASK_AGAIN_SECONDS)


def _decide(context: Context, held: str) -> Decision:
    fields: dict[str, str] | None = None
    try:
        fields = slurm.job_fields(context.launch.job_id or "")
    except SchedulerError as error:
        if not held:
            context.log.line(f"WARNING {error}")
    return decide(
        context.stop.signal,
        fields,
        now=datetime.now(),
        own_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        warning_seconds=context.spec.resources.warning_seconds,
        timeouts_left=context.spec.timeouts.max - _requeues(context, "timeout"),
        may_requeue=context.spec.resources.requeue,
    )


def _requeues(context: Context, reason: str) -> int:
    return count_requeues(since_submission(read_jsonl(context.paths.events))).get(reason, 0)
