"""python -m cifar_hpc requeue: have runs start again, from a checkpoint and without Slurm's delay.

A running job saves a checkpoint, goes back into the queue and may start again
at once; the command waits for that, and Ctrl-C ends only the waiting. A local
run saves and starts again. A job that Slurm has requeued waits about two
minutes (BeginTime), and a held one until it is released: after this both may
start at once.
"""

import argparse
import signal
import sys
import time
from functools import partial

from cifar_hpc.cli.cancel import add_runs, choose, each
from cifar_hpc.errors import RunFailedError, SchedulerError, SpecError
from cifar_hpc.runs.events import RequeueRequested
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import controller_of, holder_pid, signal_local, waits_here
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.queue import jobs_of
from cifar_hpc.runs.requeue import ALIVE, LOCAL_REQUEUES, used_up_here
from cifar_hpc.runs.state import read_state
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import QueuedJob
from cifar_hpc.text import printable

EXAMPLES = ("improved_resnet-1a2b3c4d", "improved_resnet-1a", "'dropout-*' --yes")
POLL_SECONDS = 1.0
BY_ITSELF = "goes back into the queue all the same, and starts by itself after about two minutes"

add_arguments = add_runs


def main(arguments: argparse.Namespace) -> int:
    """Checkpoint and requeue running jobs, and let requeued ones start now instead of in two minutes."""
    runs, jobs = choose(arguments, "requeue")
    asked: dict[str, tuple[RunPaths, int]] = {}
    status = each(runs, lambda run: _request(run, jobs.get(run.name), asked))
    return max(status, _wait(asked)) if asked else status


def _request(run: RunPaths, job: QueuedJob | None, asked: dict[str, tuple[RunPaths, int]]) -> None:
    """Release a waiting job, or send a running one the signal to save and requeue itself.

    Args:
        asked: gets the run and its number of attempts, by its job's id, if its job has to be waited for.
    """
    name, history, spec = run.name, History.read(run.events), read_frozen(run)
    if job is not None and job.user:
        raise SpecError(f"{name}: job {job.job_id} is {job.user}'s. HINT: ask {job.user} to requeue it.")
    if job is not None and job.waits:
        return _release(run, job)
    if job is None and holder_pid(run.lock) is None:
        gone = "has no job in the queue and no process here. HINT: submit it again to go on."
        raise SpecError(f"{name}: {'waits for its turn on this machine.' if waits_here(run, history) else gone}")
    reasons = {
        "is a process of `train`, which nothing would start again": job is None and not controller_of(run, history),
        f"the local executor restarts a job at most {LOCAL_REQUEUES} times": job is None and used_up_here(history),
        "was submitted with --no-requeue": spec is not None and not spec.resources.requeue,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        hint = f"HINT: cancel {name} saves and stops it; the same command or submission goes on from there."
        raise SpecError(f"{name}: {reason}. {hint}")
    if job is not None and job.state not in (*ALIVE, "COMPLETING"):
        raise SpecError(f"{name}: job {job.job_id} is {job.state} now. HINT: try again when status says running.")
    if job is None or job.state in ALIVE:  # before the signal, so that the run knows why it comes
        request, job_id = RequeueRequested(by=client.user_name()), job.job_id if job else history.job_id
        record_event(run, request, job_id=job_id, restart=None, world_size=None)
    if job is None:
        signal_local(run, signal.SIGUSR2)
        return print(f"run {name} saves a checkpoint and starts again")
    if job.state in ALIVE:
        client.command(["scancel", "--signal=USR2", job.job_id])
    asked[job.job_id] = run, len(history.attempts)


def _release(run: RunPaths, job: QueuedJob) -> None:
    """Let a waiting job start."""
    try:
        if (spec := read_frozen(run)) is not None:
            client.allow_fewer_nodes(job.job_id, spec.resources.fewest_tasks)
        client.release_job(job.job_id, job.held)
    except SchedulerError:
        now = jobs_of([run]).get(run.name)
        if now is None or now.waits:
            raise  # else Slurm has started it meanwhile, and refuses to change it
    waited = f" (it was waiting: {printable(job.reason)})" if job.reason != "None" else ""
    print(f"job {job.job_id} may start as soon as there is room{waited}", flush=True)


def _wait(asked: dict[str, tuple[RunPaths, int]]) -> int:
    """Release the jobs as they come back into the queue; returns the exit status."""
    left, status = dict(asked), 0
    print(f"job {', '.join(left)}: waiting for the checkpoint (Ctrl-C ends only the waiting)", flush=True)
    try:
        while left:
            time.sleep(POLL_SECONDS)
            queued = client.squeue_jobs(list(left))
            for job_id, (run, attempts) in list(left.items()):
                job = queued.get(job_id)
                if job is None or job.waits or len(History.read(run.events).attempts) > attempts:
                    del left[job_id]
                    status = max(status, each([run], partial(_settle, job=job)))
    except (KeyboardInterrupt, SchedulerError) as trouble:
        interrupted = isinstance(trouble, KeyboardInterrupt)
        words = "" if interrupted else f"{trouble}\n"
        print(printable(f"{words}job {', '.join(left)} {BY_ITSELF}"), file=sys.stderr)
        return 130 if interrupted else SchedulerError.exit_code
    return status


def _settle(run: RunPaths, job: QueuedJob | None) -> None:
    """Release a job that is back in the queue, or say what became of it instead."""
    if job is not None and job.waits:
        return _release(run, job)
    if job is not None:
        return print(f"job {job.job_id} has started again already")
    now = read_state(run, {})
    if now.state != "finished":
        raise RunFailedError(f"{run.name}: not requeued, since it is {now.state}: {now.detail}")
    print(f"{run.name} has finished meanwhile, so that nothing is left to requeue")
