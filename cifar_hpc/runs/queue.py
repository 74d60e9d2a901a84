"""Jobs of runs in Slurm's queue."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.history import History
from cifar_hpc.runs.paths import SWEEPS, RunPaths, array_points, is_run_name, same_folder
from cifar_hpc.runs.state import UNKNOWN, RunState, read_state
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import HIDDEN, ON_CLUSTER, SILENT_SECONDS, QueuedJob

ANSWER_SECONDS = 10.0  # for which a person waits for Slurm's answer
THREADS = 16  # on shared file systems most of the time passes in waiting for each small file


def queue(root: Path, timeout_seconds: float = 30) -> dict[str, QueuedJob]:
    """This user's jobs of runs under `root` by the run's name, from one call of squeue; empty without Slurm.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    queued = client.squeue(timeout_seconds)
    folders = {job.directory: Path(job.directory).parent.parent for job in queued}  # <folder>/code/<digest>
    sweeps = {folder: array_points(root, folder) for folder in set(folders.values())}
    jobs: dict[str, QueuedJob] = {}
    for job in queued:
        folder, index = folders[job.directory], job.job_id.partition("_")[2]
        # A user may have changed the job's name, or the folder that Slurm shows (scontrol update).
        in_code = Path(job.directory).parent.name == "code"
        name = folder.name if in_code else job.name
        (points, ours), logs = sweeps[folder], folder.parent
        if index.isdigit() and int(index) < len(points):
            name, logs = points[int(index)], folder.parents[2]
        elif in_code and is_run_name(name):
            ours = same_folder(root / "logs" / name, folder)
        # In another folder (an automounter's name of it, or a root that was renamed meanwhile) it is the job that the
        # run has recorded, unless this root is a copy: the original has recorded the submission as well.
        ours = ours or (_recorded(root / "logs", name, job) and not _recorded(logs, name, job))
        # Beside its job a run may have an old one, which somebody has requeued by hand: the one that runs counts.
        if ours and (name not in jobs or jobs[name].waits):
            jobs[name] = dataclasses.replace(job, name=name, behind=_behind(job, folder, queued))
    return jobs


def _recorded(logs: Path, name: str, job: QueuedJob) -> bool:
    """True if the run `name` has recorded that it was submitted, and this job as its last one."""
    history = History.read(logs / name / "events.jsonl") if is_run_name(name) else History()
    return history.job_id == job.job_id and bool(history.last_of(Submitted))


def _behind(job: QueuedJob, folder: Path, queued: Iterable[QueuedJob]) -> str:
    """The job for which a singleton waits, if it was submitted from another folder under the same name."""
    if job.waits and "singleton" in job.dependency:
        for other in queued:
            place = Path(other.directory).parent.parent
            if other.name == job.name and other.job_id != job.job_id and not same_folder(place, folder):
                return f"job {other.job_id}, of the same name in {place},"
    return ""


def jobs_of(runs: Sequence[RunPaths], timeout_seconds: float = 30) -> dict[str, QueuedJob | None]:
    """Jobs of these runs of one root, whoever submitted them, by the run's name; asks Slurm again if that leaves doubt.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    asked_at, jobs = time.time(), queue(runs[0].root, timeout_seconds) if runs else {}
    with ThreadPoolExecutor(THREADS) as pool:
        states = list(pool.map(lambda run: read_state(run, jobs, asked_at), runs))
    return {**jobs, **look_again(states, timeout_seconds)}


def look_again(states: Sequence[RunState], timeout_seconds: float = ANSWER_SECONDS) -> dict[str, QueuedJob | None]:
    """Jobs of the runs that are UNKNOWN by what `queue` says, by the run's name, from one more call of squeue.

    None where Slurm has no such job; one in the state HIDDEN where it may be hidden.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    doubtful = {state.job_id: state for state in states if state.state == UNKNOWN and state.job_id}
    elsewhere = {job_id for job_id, state in doubtful.items() if ON_CLUSTER in (state.owner or "")}
    found = client.squeue_jobs(asked, timeout_seconds) if (asked := [j for j in doubtful if j not in elsewhere]) else {}
    found = {job_id: job for job_id, job in found.items() if _works_for(job, doubtful[job_id].run)}
    others = {job_id: s for job_id, s in doubtful.items() if job_id not in found and s.owner}
    for job_id, state in others.items():
        if job_id in elsewhere or client.hides_jobs():
            found[job_id] = QueuedJob(job_id, state.run, HIDDEN, "", "", "", "", "", "", user=str(state.owner))
    jobs = {state.run: found.get(job_id) for job_id, state in doubtful.items()}
    return {run: job and dataclasses.replace(job, name=run) for run, job in jobs.items()}


def _works_for(job: QueuedJob, run: str) -> bool:
    """True if a job works in the folder of a run or of a sweep, or has its name: Slurm may give a number twice."""
    folder = Path(job.directory).parent.parent
    return run in (folder.name, job.name) or folder.parent.parent.name == SWEEPS


class QueuePoller:
    """The queue, asked at most every `interval` seconds, and less often while Slurm does not answer.

    jobs: Slurm's last answer; None before the first.
    asked_at: when the question that it answers was asked, in seconds since the epoch.
    trouble: the error while Slurm does not answer; else empty.
    """

    def __init__(self, root: Path, interval: float) -> None:
        self.root, self.interval = root, interval
        self.jobs: Mapping[str, QueuedJob | None] | None = None
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

    def read(self, runs: Sequence[RunPaths], stale: bool = True) -> list[RunState]:
        """States of runs; Slurm is asked once more for jobs of other users.

        Args:
            stale: whether Slurm's last answer counts while it does not answer.
        """
        jobs = self.jobs if stale or not self.trouble else None
        states = [read_state(paths, jobs, self.asked_at) for paths in runs]
        others = [state for state in states if state.owner]
        if jobs is None or self.trouble or not others:
            return states
        try:
            more = look_again(others)
        except SchedulerError as error:
            self.trouble, more = str(error), {}
        jobs = self.jobs = {**jobs, **more}
        return [read_state(p, jobs) if p.name in more else s for p, s in zip(runs, states, strict=True)]
