"""python -m cifar_hpc cancel: cancel a run's job."""

import argparse
import signal

from cifar_hpc.errors import DoubtError, SchedulerError, SpecError
from cifar_hpc.runs.events import Cancelled
from cifar_hpc.runs.lock import signal_local
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths, find_run, project_root
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.runs.state import jobs_of
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import HIDDEN, ON_CLUSTER, QueuedJob

DESCRIPTION = """\
The job gets SIGTERM, saves, and is not requeued; a waiting one is taken out of
the queue, also out of a sweep's job array. The same submission again goes on
from the checkpoint."""
EXAMPLES = ("improved_resnet-1a2b3c4d",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    text = "only record that its job has ended: of another user, whose jobs Slurm does not show"
    parser.add_argument("--gone", action="store_true", help=text)


def main(arguments: argparse.Namespace) -> int:
    """Cancel a run's job. A running one saves a checkpoint first, from which the run continues if submitted again."""
    run, user = arguments.run, client.user_name()
    paths = find_run(project_root(), run)
    job = jobs_of([paths]).get(run)
    if arguments.gone:
        if job is None or job.state != HIDDEN:
            what = f"job {job.job_id} is in the queue" if job else "nothing is unknown about its job"
            raise SpecError(f"--gone: {run}: {what}. HINT: leave --gone out.")
        print(f"job {job.job_id} is recorded as ended; submit again to go on from its checkpoint")
    elif job is not None:
        _cancel(paths, job)
        print(f"job {job.job_id} is cancelled; submit again to go on from its checkpoint")
    elif signal_local(paths, signal.SIGTERM):
        print(f"run {run} saves a checkpoint and stops; submit again to go on")
    else:
        raise SpecError(f"{run}: has no job in the queue and no process here; there is nothing to cancel.")
    TrainLog(paths.train_log, enabled=True).line(f"CANCELLED by {user}; submit again to go on")
    record_event(paths, Cancelled(by=user), job_id=job.job_id if job else None, restart=None, world_size=None)
    return 0


def _cancel(paths: RunPaths, job: QueuedJob) -> None:
    """Cancel a job; scancel's word that it failed is checked with the queue.

    Raises:
        SchedulerError: Slurm refused; DoubtError if that is not known.
    """
    try:
        if ON_CLUSTER in job.user:  # here its number may be another job's
            raise SchedulerError(f"job {job.job_id} is not this cluster's.")
        return client.cancel_job(job.job_id)
    except SchedulerError as refusal:
        if job.user:
            hint = f"HINT: ask {job.user}, whose job it is"
            hint += "; with --gone it is recorded as ended" if job.state == HIDDEN else ""
            raise SchedulerError(f"{refusal} {hint}.") from None
        try:
            now = jobs_of([paths]).get(paths.name)
        except SchedulerError:
            hint = "HINT: see status, and cancel again if it is still there."
            raise DoubtError(f"maybe cancelled: {refusal} {hint}") from None
        if now is not None and (now.waits or now.state in ALIVE):
            raise  # else it is gone or about to end
