"""Jobs of runs in Slurm's queue."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.runs.paths import points_file, read_points
from cifar_hpc.slurm.client import SILENT_SECONDS, QueuedJob, squeue

ANSWER_SECONDS = 10.0  # for which a person waits for Slurm's answer


def queue(root: Path, timeout_seconds: float = 30) -> dict[str, QueuedJob]:
    """This user's jobs of runs under `root` by the run's name, from one call of squeue; empty without Slurm.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    queued = squeue(timeout_seconds)
    sweeps = {directory: _points(root, directory) for directory in {job.directory for job in queued}}
    jobs: dict[str, QueuedJob] = {}
    for job in queued:
        points, index = sweeps[job.directory], job.job_id.partition("_")[2]
        if index.isdigit() and int(index) < len(points):
            name = points[int(index)]
            jobs[name] = dataclasses.replace(job, name=name)
        elif Path(job.directory).is_relative_to(root / "logs" / job.name):
            jobs[job.name] = job
    return jobs


def _points(root: Path, directory: str) -> list[str]:
    """The runs of the job array that works in `directory`, by index; none if it is not a sweep's."""
    file = points_file(root, directory)
    try:
        return read_points(file) if file is not None else []
    except SpecError:  # removed, while its jobs are still there
        return []


class QueuePoller:
    """The queue, asked at most every `interval` seconds, and less often while Slurm does not answer.

    jobs: Slurm's last answer; None before the first.
    asked_at: when the question that it answers was asked, in seconds since the epoch.
    trouble: the error while Slurm does not answer; else empty.
    """

    def __init__(self, root: Path, interval: float) -> None:
        self.root, self.interval = root, interval
        self.jobs: Mapping[str, QueuedJob] | None = None
        self.asked_at: float | None = None
        self.trouble = ""
        self.next_poll = 0.0

    def poll(self) -> None:
        """Ask Slurm, if it is time to."""
        if time.monotonic() < self.next_poll:
            return
        asked_at = time.time()
        try:
            self.jobs, self.asked_at, self.trouble = queue(self.root, ANSWER_SECONDS), asked_at, ""
        except SchedulerError as error:
            self.trouble = str(error)
        self.next_poll = time.monotonic() + (SILENT_SECONDS if self.trouble else self.interval)
