"""python -m cifar_hpc requeue: requeue a run, or start a requeued one sooner."""

import argparse
import signal

from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.lock import signal_local
from cifar_hpc.runs.paths import find_run, project_root
from cifar_hpc.runs.state import jobs_of
from cifar_hpc.slurm import client
from cifar_hpc.text import printable

DESCRIPTION = """\
A running job saves a checkpoint and goes back into the queue; a local run
saves and starts again. A job that Slurm has requeued waits about two minutes
(BeginTime), and a held one until it is released: after this both may start at
once."""
EXAMPLES = ("improved_resnet-1a2b3c4d",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")


def main(arguments: argparse.Namespace) -> int:
    """Checkpoint and requeue a running job; let a requeued one start now instead of in two minutes."""
    run = arguments.run
    paths = find_run(project_root(), run)
    job = jobs_of([paths]).get(run)
    if job is not None and job.user:
        raise SpecError(f"{run}: job {job.job_id} is {job.user}'s. HINT: ask {job.user} to requeue it.")
    if job is not None and job.waits:
        try:
            if (spec := read_frozen(paths)) is not None:
                client.allow_fewer_nodes(job.job_id, spec.resources.fewest_tasks)
            client.release_job(job.job_id, job.held)
        except SchedulerError:
            now = jobs_of([paths]).get(run)
            if now is None or now.waits:
                raise  # else Slurm has started it meanwhile, and refuses to change it
        print(f"job {job.job_id} may start as soon as there is room (it was waiting: {printable(job.reason)})")
    elif job is not None:
        # The signal of a preemption: the run saves first and then requeues itself.
        client.command(["scancel", "--signal=USR2", job.job_id])
        print(f"job {job.job_id} saves a checkpoint and requeues itself, unless it was submitted with --no-requeue")
    elif signal_local(paths, signal.SIGUSR2):
        print(f"run {run} saves a checkpoint and starts again")
    else:
        raise SpecError(f"{run}: has no job in the queue and no process here. HINT: submit it again to go on.")
    return 0
