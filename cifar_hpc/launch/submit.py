"""Submit runs: check, lock, freeze, snapshot, start, record. A refused submission leaves everything as it was.

A single run is submitted as a sweep of one point, and a job on this machine as one on Slurm.
"""

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from cifar_hpc.config.io import HERE, Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.sweep import Point
from cifar_hpc.config.validate import check
from cifar_hpc.errors import DoubtError, RunBusyError, SchedulerError, SpecError
from cifar_hpc.files import remove_leftovers, write_atomic
from cifar_hpc.launch import local, preflight
from cifar_hpc.launch.batch_script import batch_script, record_submitted, sbatch, submit_slurm
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.frozen_spec import freeze, resolve
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import RunLock, claim, lock_submission
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points
from cifar_hpc.runs.queue import ANSWER_SECONDS, THREADS, jobs_of
from cifar_hpc.slurm.client import QueuedJob

Result = TypeVar("Result")
SPARE_FILES = 200  # open files besides the locks of the runs


@dataclass(frozen=True)
class Order:
    """Runs to submit together: one run, or the points of the sweep named `sweep` as one job array.

    job_folder: of the job file, which holds the user's own code.
    parallel: how many points may run at the same time; None is no limit (on this machine: 1).
    """

    root: Path
    points: Sequence[Point]
    site: Site
    on_slurm: bool
    sweep: str | None = None
    parallel: int | None = None
    job_folder: Path = HERE

    def run(self, point: Point) -> RunPaths:
        """Files of a point's run."""
        return RunPaths(self.root, point.run)

    def resolve(self, point: Point) -> Spec:
        """Spec of a point with what its run fixes at its first start (`frozen_spec.resolve`)."""
        resources = point.spec.resources
        tasks = resources.max_nodes * resources.ntasks_per_node
        share = 1 if self.on_slurm else max(1, len(os.sched_getaffinity(0)) // tasks)
        return resolve(self.run(point), point.spec, tasks, resources.cpus_per_task or share)


@dataclass(frozen=True)
class Submission:
    """Outcome of an order.

    starts: where each run of the order begins or goes on, by name.
    submitted: by index in the job array; in a preview those that would be submitted.
    finished: epochs of the runs that need no job, by name.
    busy: reasons why the other runs were not submitted, by name.
    job_id: of the job or the job array; on this machine the process id of its controller.
    folder: of the job.
    images: number and size of the images, where they take much memory.
    """

    starts: Mapping[str, preflight.Start]
    submitted: Sequence[Point] = ()
    finished: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[str, str] = field(default_factory=dict)
    job_id: str | None = None
    folder: RunPaths | SweepPaths | None = None
    images: str | None = None


def preview(order: Order, ask_slurm: bool) -> tuple[Submission, str]:
    """(outcome without a job, batch script or Slurm's estimate of its start); writes nothing and ignores the queue.

    On this machine there is no script.

    Args:
        ask_slurm: ask `sbatch --test-only`.
    """
    left, found = _split_finished(order)
    found = replace(found, submitted=left)
    first = (left or order.points)[0]  # for the resources, which all points share
    if not order.on_slurm:
        preflight.check_this_machine(order.resolve(first))
        return found, ""
    folder = order.run(first) if order.sweep is None else SweepPaths(order.root, order.sweep)
    script = batch_script(folder, order.resolve(first), order.site, max(1, len(left)), order.parallel)
    return found, sbatch("--test-only", script) if ask_slurm else script


def submit(order: Order) -> Submission:
    """Submit the runs that have not finished and are not busy. No file changes before the input checks have passed."""
    left, found = _split_finished(order)
    first = order.resolve((left or order.points)[0])
    if not left:
        return found
    if not order.on_slurm:
        preflight.check_this_machine(first)
    data = {
        key: preflight.check_data(spec, order.root) for key, spec in {str(p.spec.data): p.spec for p in left}.items()
    }
    left = [replace(p, spec=check(replace(p.spec, data=data[str(p.spec.data)][0]))) for p in left]
    images = next((words for _, words in data.values() if words), None)
    sweep = SweepPaths(order.root, order.sweep) if order.sweep else None
    with contextlib.ExitStack() as locks:
        held = [lock_submission(sweep.sweep, f"sweep {sweep.name}")] if sweep else []
        for lock in held:
            locks.callback(lock.release)
        locked, busy = _lock_free(locks, order, left)
        free = [point for point in left if point.run in locked]
        if not free:
            return replace(found, busy=busy)
        runs = [order.run(point) for point in free]
        specs = _each(order.resolve, free)  # again: another submission may have come first
        _each(lambda run: remove_leftovers(run.logs), runs)
        folder = _new_folder(sweep) if sweep else runs[0]
        with _undone_on_refusal(folder, runs):
            code = take_snapshot(folder)
            if isinstance(folder, SweepPaths):
                write_points(folder, [run.name for run in runs])
            _each(freeze, runs, specs, [order.job_folder] * len(runs))
            _each(claim, runs)
            if order.on_slurm:
                job_id = submit_slurm(folder, specs[0], order.site, code, len(runs), order.parallel)
            else:
                job_id = local.start(folder, code, [*held, *locked.values()], order.parallel or 1)
        if order.on_slurm:
            _each(lambda index, run: _record(folder, run, index, job_id, code), range(len(runs)), runs)
    return replace(found, submitted=free, busy=busy, job_id=job_id, folder=folder, images=images)


def _split_finished(order: Order) -> tuple[list[Point], Submission]:
    """(points with epochs left, outcome if none of them is submitted)."""
    starts = _each(lambda point: preflight.start_of(order.run(point)), order.points)
    pairs = list(zip(order.points, starts, strict=True))
    done = {p.run: s.finished_epochs for p, s in pairs if s.finished_epochs == p.spec.train.epochs}
    left = [point for point in order.points if point.run not in done]
    return left, Submission({point.run: start for point, start in pairs}, finished=done)


def _lock_free(
    locks: contextlib.ExitStack, order: Order, points: Sequence[Point]
) -> tuple[dict[str, RunLock], dict[str, str]]:
    """(locks of the runs that may be submitted, reasons against the others), by run."""
    _allow_open_files(len(points) + SPARE_FILES)
    order.run(points[0]).create()  # the shared folders once: the threads would race for them
    _each(lambda point: order.run(point).create(), points)
    locked, busy = {}, {}
    for point in points:
        try:
            lock = locked[point.run] = lock_submission(order.run(point).logs, f"run {point.run}")
            locks.callback(lock.release)
        except RunBusyError as error:
            busy[point.run] = str(error)
    jobs = _jobs(order, [order.run(point) for point in points if point.run in locked])
    reasons = _each(lambda run: preflight.why_busy(RunPaths(order.root, run), jobs), locked)
    busy |= {run: reason for run, reason in zip(locked, reasons, strict=True) if reason is not None}
    return {run: lock for run, lock in locked.items() if run not in busy}, busy


def _jobs(order: Order, runs: Sequence[RunPaths]) -> Mapping[str, QueuedJob | None]:
    """Jobs of the runs; for an order on this machine of those that were submitted to Slurm, if it answers."""
    if order.on_slurm:
        return jobs_of(runs)
    on_slurm = [run for run in runs if History.read(run.events).last_of(Submitted).get("scheduler") == "slurm"]
    with contextlib.suppress(SchedulerError):
        return jobs_of(on_slurm, ANSWER_SECONDS)
    return {}


def _allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise SpecError(
            f"{number} open files are needed, {SPARE_FILES} and one for each run, and {hard} are allowed here (ulimit "
            "-Hn). HINT: submit a large sweep in parts."
        )
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _new_folder(sweep: SweepPaths) -> SweepPaths:
    """Folder of this submission of a sweep, beside those of earlier ones, whose jobs may still run."""
    earlier = [replace(sweep, number=int(path.name)) for path in sweep.sweep.iterdir() if path.name.isdigit()]
    for killed in (folder for folder in earlier if not folder.points.exists()):  # before it submitted anything
        shutil.rmtree(killed.logs)
    new = replace(sweep, number=max((folder.number for folder in earlier), default=0) + 1)
    new.create()
    return new


def _record(folder: RunPaths | SweepPaths, run: RunPaths, index: int, job_id: str, code: Path) -> None:
    """Record a job on Slurm, and link a task's output: Slurm writes that of an array into one folder."""
    if isinstance(folder, RunPaths):
        return record_submitted(run, job_id, "slurm", code)
    task = f"{job_id}_{index}"
    record_submitted(run, task, "slurm", code, sweep=str(folder.logs.relative_to(folder.root)))
    output = f"{task}_0_log.out"
    with contextlib.suppress(OSError):
        (run.slurm / output).symlink_to(os.path.relpath(folder.slurm / output, run.slurm))


@contextlib.contextmanager
def _undone_on_refusal(folder: RunPaths | SweepPaths, runs: Sequence[RunPaths]) -> Iterator[None]:
    """Put back the frozen specs of `runs` and remove the files of the job if the block raises an exception.

    Nothing is undone where the job may exist.
    """
    specs = _each(lambda run: run.spec.read_bytes() if run.spec.exists() else None, runs)
    files, copies = set(folder.slurm.iterdir()), set(folder.code.glob("*"))
    try:
        yield
    except DoubtError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder.logs)  # where writing has failed, Python does not name a file
        for run, content in zip(runs, specs, strict=True):
            if content is None:
                run.spec.unlink(missing_ok=True)
            else:
                write_atomic(run.spec, content)
        if isinstance(folder, SweepPaths):
            shutil.rmtree(folder.logs)
        else:
            for path in set(folder.slurm.iterdir()) - files:
                path.unlink()
            for copy in set(folder.code.glob("*")) - copies:
                shutil.rmtree(copy)
        raise


def _each(function: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, *arguments))
