"""Doctor's job: submitted as runs are, waited for, and gone without a trace unless something was wrong."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cifar_hpc.cli.doctor.doctor_files import LOCK, PLAN, hold_lock, task_file
from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError
from cifar_hpc.files import write_atomic
from cifar_hpc.launch import batch_script
from cifar_hpc.launch import executors as launcher
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.slurm import client as slurm

TIME_LIMIT = "5"  # minutes; it takes one, most of it for importing torch
POLL_SECONDS = 1.0
ENDING_SECONDS = 60.0
# With these a job waits until somebody changes it or the partition (squeue(1), JOB REASON CODES).
HOPELESS = (
    "AccountNotAllowed", "BadConstraints", "InvalidAccount", "InvalidQOS", "JobHeldAdmin", "PartitionConfig",
    "PartitionDown", "PartitionInactive", "PartitionNodeLimit", "PartitionTimeLimit", "QOSNotAllowed",
)  # fmt: skip


@dataclass
class JobOutcome:
    """How doctor's job ended.

    state: Slurm's word, such as COMPLETED; "PENDING" where it was not waited for any longer.
    tasks: reports of the tasks, by rank, as far as they came back.
    output: the last lines of what the job printed.
    """

    job_id: str
    state: str
    reason: str
    token: str
    expected: int
    tasks: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""
    kept: bool = False

    def keep(self, folder: Path) -> Path:
        """Leave what the job printed; returns where it is."""
        self.kept = True
        return folder / "slurm"


@contextlib.contextmanager
def doctors_job(
    root: Path, spec: Spec, site: Site, packages: Mapping[str, str], patience: float, say: Callable[[str], None]
) -> Iterator[tuple[JobOutcome, Path]]:
    """Run the job; yields how it ended, and its folder, which is removed at the end unless the outcome is kept.

    Args:
        packages: those whose versions the tasks report.
        patience: seconds that the job may wait for its start.
        say: told what is under way.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    paths = RunPaths(root, f".doctor-{secrets.token_hex(4)}")
    paths.slurm.mkdir(parents=True)
    outcome = None
    try:
        with hold_lock(paths.logs / LOCK):
            outcome = _run(paths, spec, site, packages, patience, say)
        yield outcome, paths.logs
    finally:
        kept = outcome is not None and outcome.kept
        for path in paths.logs.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)
            elif not (kept and path == paths.slurm):
                shutil.rmtree(path, ignore_errors=True)
        if not kept:
            shutil.rmtree(paths.logs, ignore_errors=True)


def _run(
    paths: RunPaths, spec: Spec, site: Site, packages: Mapping[str, str], patience: float, say: Callable[[str], None]
) -> JobOutcome:
    token = secrets.token_hex(16)
    data = str(paths.root / spec.data.root)
    plan = {"token": token, "source": spec.data.source, "data": data, "packages": list(packages)}
    write_atomic(paths.logs / PLAN, json.dumps(plan).encode())
    code = take_snapshot(paths)
    spec = replace(spec, resources=replace(spec.resources, time=TIME_LIMIT))
    script = batch_script.module_script(paths, spec, site, ["cifar_hpc.cli.doctor.doctor_job", str(paths.logs)])
    job_id = launcher.submit_script(script, code)
    expected = spec.resources.max_nodes * spec.resources.ntasks_per_node
    nodes = spec.resources.max_nodes
    say(f"job {job_id}: {_count(expected, 'task')} on {_count(nodes, 'node')}; Ctrl-C cancels it")
    try:
        state, reason = _wait(job_id, patience, say)
    except BaseException:
        _cancel(job_id)
        say(f"job {job_id}: cancelled")
        raise
    outcome = JobOutcome(job_id, state, reason, token, expected)
    outcome.tasks = _reports(paths.logs, expected)
    outcome.output = _last_lines(paths.slurm)
    return outcome


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _wait(job_id: str, patience: float, say: Callable[[str], None]) -> tuple[str, str]:
    """Until the job has ended, or will not start: (state, reason)."""
    begin, said = time.monotonic(), ""
    while True:
        try:
            fields = slurm.job_fields(job_id)
        except SchedulerError as error:
            if "Invalid job id" not in str(error):
                raise
            return "GONE", "Slurm has forgotten it"
        state, reason = fields.get("JobState", "?"), fields.get("Reason", "?")
        if state not in (*ALIVE, "PENDING", "CONFIGURING", "COMPLETING", "SUSPENDED"):
            return state, reason
        waited = time.monotonic() - begin
        if state == "PENDING" and (reason in HOPELESS or waited > patience):
            _cancel(job_id)
            return state, reason
        if (words := _where(state, reason, fields.get("NodeList", "?"))) != said:
            say(f"job {job_id}: {words}")
            said = words
        time.sleep(POLL_SECONDS)


def _where(state: str, reason: str, nodes: str) -> str:
    if state != "PENDING":
        return f"{state.lower()} on {nodes}"
    return "queued" if reason == "None" else f"queued ({reason})"


def _cancel(job_id: str) -> None:
    """Cancel the job and wait until nothing of it writes any more."""
    with contextlib.suppress(SchedulerError):
        slurm.cancel(job_id)
        end = time.monotonic() + ENDING_SECONDS
        while slurm.job_fields(job_id).get("JobState") in (*ALIVE, "COMPLETING") and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 5)


def _reports(folder: Path, expected: int) -> list[dict[str, Any]]:
    reports = []
    list(folder.iterdir())  # makes an NFS client look again instead of trusting its cache
    for rank in range(expected):
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(task_file(folder, rank).read_text())
            if isinstance(report, dict):
                reports.append(report)
    return reports


def _last_lines(folder: Path, count: int = 3) -> str:
    """The end of what rank 0, or else another task, has printed."""
    for path in sorted(folder.glob("*_log.out")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return " / ".join(lines[-count:])
    return ""
