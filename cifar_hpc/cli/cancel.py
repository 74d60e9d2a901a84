"""python -m cifar_hpc cancel: cancel a run's job."""

import argparse
import getpass
import os
import signal

from cifar_hpc.errors import SpecError
from cifar_hpc.runs.events import Cancelled
from cifar_hpc.runs.lock import signal_local
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import find_run, project_root
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.state import queue
from cifar_hpc.slurm import client

DESCRIPTION = """\
The job gets SIGTERM, saves, and is not requeued; a waiting one is taken out of
the queue, also out of a sweep's job array. The same submission again goes on
from the checkpoint."""
EXAMPLES = ("improved_resnet-1a2b3c4d",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")


def main(arguments: argparse.Namespace) -> int:
    """Cancel a run's job. A running one saves a checkpoint first, from which the run continues if submitted again."""
    run = arguments.run
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have no name
        user = str(os.getuid())
    paths = find_run(project_root(), run)
    job = queue(paths.root).get(run)
    if job is not None:
        client.cancel_job(job.job_id)
        print(f"job {job.job_id} is cancelled; submit again to go on from its checkpoint")
    elif signal_local(paths, signal.SIGTERM):
        print(f"run {run} saves a checkpoint and stops; submit again to go on")
    else:
        raise SpecError(f"{run}: has no job in the queue and no process here; there is nothing to cancel.")
    TrainLog(paths.train_log, enabled=True).line(f"CANCELLED by {user}; submit again to go on")
    record_event(paths, Cancelled(by=user), job_id=job.job_id if job else None, restart=None, world_size=None)
    return 0
