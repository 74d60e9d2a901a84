"""python -m cifar_hpc requeue and cancel: telling a run's job what to do, wherever it is."""

from __future__ import annotations

import getpass
import os
import signal

from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.runs import lock as runlock
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.events import append_event
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.lock import local_controller
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths, find_run, project_root
from cifar_hpc.slurm import client as slurm
from cifar_hpc.text import printable


def requeue(run: str) -> int:
    """Requeue a running job by the way of a checkpoint; let a requeued one start now instead of in two minutes."""
    paths = find_run(project_root(), run)
    job = run_queue.queue(paths.root).get(run)
    if job is not None and job.waits:
        try:
            _start_soon(paths, job)
        except SchedulerError:
            now = run_queue.queue(paths.root).get(run)
            if now is None or now.waits:
                raise  # else Slurm has started it meanwhile, and refuses to change it
        print(f"job {job.job_id} may start as soon as there is room (it was waiting: {printable(job.reason)})")
    elif job is not None:
        # The signal of a preemption: the run saves first and then requeues itself.
        slurm.command(["scancel", "--signal=USR2", job.job_id])
        print(f"job {job.job_id} saves a checkpoint and requeues itself, unless it was submitted with --no-requeue")
    elif not _signal_local(paths, signal.SIGUSR2):
        raise SpecError(f"{run}: has no job in the queue and no process here. HINT: submit it again to go on.")
    else:
        print(f"run {run} saves a checkpoint and starts again")
    return 0


def _start_soon(paths: RunPaths, job: slurm.QueuedJob) -> None:
    spec = read_frozen(paths)
    if spec is not None:
        slurm.allow_fewer_nodes(job.job_id, spec.resources.fewest_tasks)
    slurm.release(job.job_id)
    if job.held:  # JobHeldUser, or launch_failed_requeued_held after a node's trouble; last, since now it may start
        slurm.command(["scontrol", "release", job.job_id])


def cancel(run: str) -> int:
    """Cancel a run's job; a running one saves a checkpoint first, and submitting again goes on from there."""
    paths = find_run(project_root(), run)
    job = run_queue.queue(paths.root).get(run)
    if job is not None:
        slurm.cancel(job.job_id)
        print(f"job {job.job_id} is cancelled; submit again to go on from its checkpoint")
    elif _signal_local(paths, signal.SIGTERM):
        print(f"run {run} saves a checkpoint and stops; submit again to go on")
    else:
        raise SpecError(f"{run}: has no job in the queue and no process here; there is nothing to cancel.")
    TrainLog(paths.train_log, enabled=True).line(f"CANCELLED by {getpass.getuser()}; submit again to go on")
    append_event(
        paths.events,
        "cancelled",
        job_id=job.job_id if job else None,
        restart=None,
        world_size=None,
        by=getpass.getuser(),
    )
    return 0


def _signal_local(paths: RunPaths, number: signal.Signals) -> bool:
    """Signal the run's processes on this machine; whether there were any."""
    controller = local_controller(paths)
    if number is signal.SIGTERM and controller is not None:
        os.kill(controller, number)  # submitit's controller hands it to every task
        return True
    pid = runlock.holder_pid(paths.lock)
    if pid is None:
        return False
    os.kill(pid, number)  # one rank is enough: all agree on where to stop
    return True
