"""The jobs of runs in Slurm's queue."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.runs.paths import points_file, read_points
from cifar_hpc.slurm.client import _QUEUE_FORMAT, QueuedJob, _unconfigured, command


def queue(root: Path, timeout_seconds: float = 30) -> dict[str, QueuedJob]:
    """This user's jobs of runs under `root`, by the run's name, from one call; empty where there is no Slurm.

    Raises:
        SchedulerError: where there is a Slurm and it does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    try:
        # By number: $LOGNAME, from which getpass takes the name, is another user's under su(1). With --array each
        # waiting task of an array has a line of its own, too.
        arguments = ["--noheader", "--array", "--user", str(os.getuid()), f"--format={_QUEUE_FORMAT}"]
        text = command(["squeue", *arguments], timeout_seconds)
    except SchedulerError as error:
        if _unconfigured(error):
            return {}
        raise
    lines = text.splitlines()
    points: dict[str, list[str]] = {}
    jobs: dict[str, QueuedJob] = {}
    bars = _QUEUE_FORMAT.count("|")
    for job in (QueuedJob(*line.split("|", bars)) for line in lines if line.count("|") >= bars):
        if job.directory not in points:
            points[job.directory] = _points(root, job.directory)
        index = job.job_id.partition("_")[2]
        if index.isdigit() and int(index) < len(points[job.directory]):
            job = dataclasses.replace(job, name=points[job.directory][int(index)])
        elif not Path(job.directory).is_relative_to(root / "logs" / job.name):
            continue
        jobs[job.name] = job
    return jobs


def _points(root: Path, directory: str) -> list[str]:
    """The runs of the job array that works in `directory`, by index; none where it is no sweep's."""
    file = points_file(root, directory)
    try:
        return read_points(file) if file is not None else []
    except SpecError:  # removed, while its jobs are still there
        return []
