"""The end of an attempt that finished or was stopped: logs, and the requeue if there is one."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import datetime

from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs.events import Finished, Holding, Left, Signal
from cifar_hpc.runs.history import History
from cifar_hpc.runs.requeue import Decision, Ending, decide, request_requeue
from cifar_hpc.slurm.client import allow_fewer_nodes, job_fields
from cifar_hpc.training.context import Context
from cifar_hpc.training.trainer import Position

# submitit's local controller starts the tasks again when one exits with this (submitit.local.local).
LOCAL_REQUEUE_STATUS = 144
# How long a process waits for Slurm to end it, if it could not ask for a requeue itself.
HOLD_SECONDS = 3600
ASK_AGAIN_SECONDS = 10


def finished(context: Context, position: Position | None) -> None:
    """Log the end of the last epoch."""
    assert position is not None
    last, best = position.history[-1], position.best
    context.log.line(
        f"FINISHED {position.epoch} epochs, {position.step} steps: test accuracy {last['test_accuracy']:.2f}% "
        f"(best {best['test_accuracy']:.2f}% at epoch {best['epoch']})"
    )
    context.emit(Finished(step=position.step, epoch=position.epoch, test_accuracy=last["test_accuracy"], best=best))


def stopped(context: Context, position: Position | None, stored: bool) -> int:
    """Log a stop by a signal and requeue the run if that is the decision; returns the exit status.

    Args:
        stored: whether a checkpoint of `position` is on disk.
    """
    _log_stop(context, position, stored)
    launch, received = context.launch, context.stop.signal
    if launch.scheduler is not None and not context.speaks:
        return 0  # any other status could make srun kill rank 0 before it has requeued, or the executor restart the job
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    ending = Ending("signal", launch.scheduler, received, restarts)
    deadline = time.monotonic() + HOLD_SECONDS
    held = ""
    while True:
        decision = decide_now(context, ending, quiet=bool(held))
        if decision.action == "requeue":
            context.log.line(decision.explanation)
            try:
                return restart(context, decision)
            except SchedulerError as refusal:
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
        time.sleep(ASK_AGAIN_SECONDS)
    if launch.scheduler != "slurm":
        return 128 + (received or signal.SIGTERM)
    allow_fewer_nodes(launch.job_id or "", context.spec.resources.fewest_tasks)
    return 1


def _log_stop(context: Context, position: Position | None, stored: bool) -> None:
    stop = context.stop
    name = stop.signal.name if stop.signal else "another rank's signal"
    seconds = round(stop.seconds, 3) if stop.seconds is not None else None
    step, epoch = (position.step, position.epoch) if position else (None, None)
    context.emit(Signal(signal=name, seconds=seconds, step=step, epoch=epoch))
    at = "nothing had been computed yet"
    if position is not None:
        place = "is on disk" if stored else "is NOT on disk; the checkpoint before it is used instead"
        at = f"step {position.step} {place}"
    after = f", {seconds:.1f} s after the signal" if seconds is not None else ""
    context.log.line(f"STOPPED by {name}: {at}{after}")


def decide_now(context: Context, ending: Ending, quiet: bool = False) -> Decision:
    """The decision on a requeue, by the run's events and the job's state.

    Args:
        quiet: do not log that Slurm does not answer.
    """
    job = None
    if ending.scheduler == "slurm":
        try:
            job = job_fields(context.launch.job_id or "")
        except SchedulerError as error:
            if not quiet:
                context.log.line(f"WARNING {error}")
    return decide(ending, context.spec, History.read(context.paths.events), job, datetime.now())


def restart(context: Context, decision: Decision) -> int:
    """Have the run started again; returns the exit status to end with.

    Raises:
        SchedulerError: Slurm refused.
    """
    if context.launch.scheduler == "slurm":
        request_requeue(context.launch.job_id or "", decision, context.spec, context.emit)
        return 0
    context.emit(decision.event())
    time.sleep(decision.delay_seconds)
    return LOCAL_REQUEUE_STATUS
