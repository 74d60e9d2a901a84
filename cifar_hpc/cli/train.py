"""python -m cifar_hpc train: training without a scheduler, in one process, under torchrun or under srun."""

import argparse
import os
import socket

from cifar_hpc.cli.parser import SEVERAL, job_file
from cifar_hpc.training.process import StopFlag, Stopwatch, launch_of

DESCRIPTION = """\
Trains in this process, without submitit; several processes under torchrun
or srun train together. The same command again goes on from the newest good
checkpoint, with the same bits. SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU and
the first Ctrl-C save a checkpoint and stop.

Writes logs/RUN/ (spec.yaml, train.log, metrics.jsonl, events.jsonl) and
checkpoints/RUN/. Exit status: 0 finished, 1 failed, 2 bad spec or arguments, 4
the run is being trained already, 128 + N stopped by signal N."""
EXAMPLES = (
    "jobs/demo.yaml --set train.epochs=2",
    "jobs/improved_resnet.yaml --set data.source=synthetic train.device=cpu --name try",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.yaml", help="what to train")
    parser.add_argument("--set", metavar="KEY.PATH=VALUE", dest="overrides", help="override keys of the job", **SEVERAL)
    parser.add_argument("--name", metavar="RUN", help="the run's name (default: from what differs from the defaults)")


def main(arguments: argparse.Namespace) -> int:
    """Train a job in this process; returns the exit status (128 + signal number after a signal to stop)."""
    stop = StopFlag().install(interactive=True)
    startup = Stopwatch()
    from cifar_hpc.config.io import load_spec, run_name
    from cifar_hpc.runs.frozen_spec import freeze, resolve
    from cifar_hpc.runs.lock import lock_submission
    from cifar_hpc.runs.paths import RunPaths, check_run_name, project_root

    path = job_file(arguments.job)
    spec = load_spec(path, arguments.overrides)
    paths = RunPaths(project_root(), check_run_name(arguments.name or run_name(path.stem, spec)))
    launch, threads = launch_of(os.environ, paths.slurm / "rendezvous")
    spec = resolve(paths, spec, launch.world_size, spec.resources.cpus_per_task or threads)

    from cifar_hpc.data.cifar10 import fetch_cifar10
    from cifar_hpc.training.attempt import Attempt
    from cifar_hpc.training.context import Context

    context = Context(paths, spec, launch, stop, startup)
    paths.create()
    if launch.rank == 0:
        if spec.data.source == "cifar10":
            fetch_cifar10(paths.root / spec.data.root)  # reading verifies it
        submission = lock_submission(paths.logs, f"run {paths.name}")
        context.lock.acquire({"job_id": launch.job_id, "host": socket.gethostname(), "pid": os.getpid()})
        # Again: another process may have come first.
        context.spec = resolve(paths, spec, launch.world_size, spec.resources.cpus_per_task or threads)
        freeze(paths, context.spec)
        submission.release()
        print(f"run {paths.name}\nlog {paths.train_log}", flush=True)
    attempt = Attempt(context)
    status = attempt.run()
    if not attempt.finished:
        os._exit(status)  # at once: process groups whose peers are gone can take minutes to end
    stop.ignore()
    return 0
