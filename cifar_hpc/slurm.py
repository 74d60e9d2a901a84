"""Questions to Slurm and requests of it, through its own commands (scontrol(1), squeue(1), scancel(1))."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cifar_hpc.errors import SchedulerError


def command(arguments: Sequence[str], timeout_seconds: float = 30, stderr_too: bool = False) -> str:
    """Run one of Slurm's commands and return what it prints.

    Raises:
        SchedulerError: with the command's own words, where it is missing, refuses, or does not answer.
    """
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except FileNotFoundError:
        raise SchedulerError(
            f"{arguments[0]} is not on PATH. HINT: is this a node of the cluster, is Slurm's module loaded?"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{' '.join(arguments)} did not answer within {timeout_seconds:g} s.") from None
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip() or f"exit status {result.returncode}"
        raise SchedulerError(f"{' '.join(arguments)} was refused: {words}")
    return result.stdout + (result.stderr if stderr_too else "")


def answers() -> bool:
    """Whether this machine can submit to a Slurm.

    Raises:
        SchedulerError: where Slurm is configured but its controller does not answer: quietly training on a login
            node instead would be the wrong surprise.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        command(["squeue", "--noheader", "--jobs=1", "--states=all"], timeout_seconds=15)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return True
        if _unconfigured(error):
            return False
        raise SchedulerError(
            f"Slurm is installed but does not answer: {error} HINT: try again, or use --cluster local "
            "to train on this machine."
        ) from None
    return True


def job_fields(job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job -o`, such as JobState, PreemptTime, EndTime, Restarts.

    Raises:
        SchedulerError: where scontrol is missing or does not know the job.
    """
    line = command(["scontrol", "show", "job", "-o", job_id]).splitlines()[0]
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s\S+?=|\s*$)", line))


def requeue(job_id: str) -> None:
    """Put a running job back into the queue."""
    command(["scontrol", "requeue", job_id])


def release(job_id: str) -> None:
    """Let a requeued job start at once instead of after Slurm's two minutes (Reason=BeginTime)."""
    command(["scontrol", "update", f"jobid={job_id}", "StartTime=now"])


def cancel(job_id: str) -> None:
    """Cancel a job."""
    command(["scancel", job_id])


def parse_instant(text: str | None) -> datetime | None:
    """A time as scontrol prints it (local, to the second), or None for N/A, Unknown and None."""
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue."""

    job_id: str
    name: str
    state: str
    reason: str
    start: str  # expected or actual, as squeue prints it
    nodes: str
    directory: str  # the folder it works in: the run's code snapshot


def queue(root: Path) -> dict[str, QueuedJob]:
    """This user's jobs of runs under `root`, by the run's name, from one call; empty where there is no Slurm.

    Raises:
        SchedulerError: where there is a Slurm and it does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    try:
        text = command(["squeue", "--noheader", "--user", getpass.getuser(), "--format=%i|%j|%T|%r|%S|%N|%Z"])
    except SchedulerError as error:
        if _unconfigured(error):
            return {}
        raise
    lines = text.splitlines()
    jobs = [QueuedJob(*line.split("|", 6)) for line in lines if line.count("|") >= 6]
    return {job.name: job for job in jobs if Path(job.directory).is_relative_to(root / "logs" / job.name)}


def _unconfigured(error: SchedulerError) -> bool:
    """Whether Slurm's programs are installed here without belonging to any cluster."""
    return any(words in str(error) for words in ("configuration source", "Unable to process configuration file"))
