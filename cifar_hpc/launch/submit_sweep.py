"""Submitting a sweep: every point that has not finished and is not under way, as one job array."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.sweep import Point, Sweep
from cifar_hpc.errors import RunBusyError, SchedulerError, SpecError
from cifar_hpc.files import DIRECTORY_MODE, remove_leftovers
from cifar_hpc.launch import batch_script, local_sweep
from cifar_hpc.launch import executors as launcher
from cifar_hpc.launch import preflight as checks
from cifar_hpc.launch import submit as submission
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.frozen_spec import complete, freeze, resolve
from cifar_hpc.runs.paths import RunPaths, SweepPaths, check_run_name, project_root, write_points

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = 16  # on shared file systems most of the time goes by in waiting for each small file
SPARE_FILES = 200  # open files beside the points' locks
SHOWN_POINTS = 10


@dataclass(frozen=True)
class Plan:
    """What a submission does with each point: `left` is submitted; why not the others, by the run's name."""

    left: Sequence[Point]
    finished: Sequence[Point]
    busy: dict[str, str]


def submit_sweep(arguments: argparse.Namespace, name: str, sweep: Sweep, site: Site) -> int:
    """Submit, or with --dry-run and --test-only see what would be; returns the exit status.

    Args:
        arguments: of submit.py.
        name: of the sweep; its runs are named <name>-<8 hex digits>.
    """
    if arguments.follow:
        raise SpecError(
            "--follow: a sweep is many runs, and this follows one. HINT: python -m cifar_hpc status --watch"
        )
    for run in (name, sweep.points[0].run):  # all names of points are of one length
        check_run_name(run)
    paths = SweepPaths(project_root(), name)
    on_slurm = arguments.dry_run or checks.on_slurm("slurm" if arguments.test_only else arguments.cluster)
    specs = {point.run: complete(point.spec, point.spec, *_processes(point.spec, on_slurm)) for point in sweep.points}
    plan = _without_finished(paths.root, sweep)
    if arguments.dry_run or arguments.test_only:
        print(_preview(paths, sweep, plan, site, test_only=arguments.test_only and not arguments.dry_run))
        return 0
    if not on_slurm:
        launcher.check_one_node(sweep.points[0].spec)
        checks.check_local_gpus(sweep.points[0].spec)
    for data in _distinct(specs[point.run] for point in plan.left):
        checks.check_data(data, paths.root)
    answer: dict[str, Any] = {"job_id": None}
    if plan.left:
        plan, answer = _send(paths, sweep, plan, site, on_slurm)
    answer = {"sweep": name, **answer, "points": _rows(sweep, plan, answer["job_id"], on_slurm)}
    submission.print_answer(answer, arguments.json, _describe(answer, plan))
    return 0


def _preview(paths: SweepPaths, sweep: Sweep, plan: Plan, site: Site, *, test_only: bool) -> str:
    """What sbatch says about the array, or its script and, as comments, its points; the queue is not looked at."""
    spec = sweep.points[0].spec  # for the resources, which all points share
    script = batch_script.array_script(paths, spec, site, max(1, len(plan.left)), sweep.parallel)
    if test_only:
        return launcher.test_only(script)
    return "\n".join([script, *(f"# {i} {point.run} {point}" for i, point in enumerate(plan.left))])


def _processes(spec: Spec, on_slurm: bool) -> tuple[int, int]:
    return submission.processes(spec, local=not on_slurm)


def _without_finished(root: Path, sweep: Sweep) -> Plan:
    done = _each(lambda p: submission.finished_epochs(RunPaths(root, p.run)) >= p.spec.train.epochs, sweep.points)
    split = {state: [p for p, d in zip(sweep.points, done, strict=True) if d is state] for state in (False, True)}
    return Plan(split[False], split[True], {})


def _distinct(specs: Iterable[Spec]) -> Iterable[Spec]:
    """One spec for each place that images come from."""
    return {(spec.data.source, spec.data.root): spec for spec in specs}.values()


def _send(paths: SweepPaths, sweep: Sweep, plan: Plan, site: Site, on_slurm: bool) -> tuple[Plan, dict[str, Any]]:
    """`submission.send` for many runs: each is locked, checked and frozen like one that is submitted alone."""
    paths.sweep.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(submission.one_submission(paths.sweep, f"sweep {paths.name}"))
        if not on_slurm:
            local_sweep.check_none(paths)
        plan = _lock(held, paths.root, plan, on_slurm)
        if not plan.left:
            return plan, {"job_id": None}
        runs = [RunPaths(paths.root, point.run) for point in plan.left]
        specs = _each(lambda p: resolve(RunPaths(paths.root, p.run), p.spec, *_processes(p.spec, on_slurm)), plan.left)
        _each(lambda run: remove_leftovers(run.logs), runs)  # of submissions that were killed
        paths = held.enter_context(_new_submission(paths))
        code = take_snapshot(paths)
        write_points(paths, [run.name for run in runs])
        with _all_frozen(runs, specs):
            if on_slurm:
                job = launcher.submit_array(paths, specs[0], site, code, len(runs), sweep.parallel)
                _each(lambda item: _record(paths, item[1], f"{job}_{item[0]}", code.name), list(enumerate(runs)))
            else:
                job = local_sweep.start(paths, code, sweep.parallel or 1)
    return plan, {
        "job_id": job,
        "cluster": "slurm" if on_slurm else "local",
        "logs": str(paths.logs),
        "runs": str(paths.root / "logs" / f"{paths.name}-*"),
        "status": f"{submission.python()} status {shlex.quote(f'{paths.name}-*')}",
        "cancel": f"scancel {job}" if on_slurm else f"kill {job}",
    }


def _lock(held: contextlib.ExitStack, root: Path, plan: Plan, on_slurm: bool) -> Plan:
    """Take the lock of each point's submissions; leave out what is being submitted, is queued, or runs."""
    _allow_open_files(len(plan.left) + SPARE_FILES)
    for point in plan.left[:1]:  # the folders that all share, once: the threads below would race for them
        RunPaths(root, point.run).create()
    _each(lambda point: RunPaths(root, point.run).create(), plan.left)
    mine, busy = [], {}
    for point in plan.left:
        paths = RunPaths(root, point.run)
        try:
            held.enter_context(submission.one_submission(paths.logs, f"run {point.run}"))
            mine.append(point)
        except RunBusyError as error:
            busy[point.run] = str(error)
    jobs = run_queue.queue(root) if on_slurm else {}

    def why_not(point: Point) -> str | None:
        try:
            checks.check_free_beside(RunPaths(root, point.run), jobs)
        except RunBusyError as error:
            return str(error)
        return None

    reasons = dict(zip((p.run for p in mine), _each(why_not, mine), strict=True))
    busy |= {run: reason for run, reason in reasons.items() if reason is not None}
    return Plan([p for p in mine if p.run not in busy], plan.finished, busy)


def _allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < number:
            raise SpecError(
                f"sweep: needs {number} open files, one for each point, and {hard} are allowed here (ulimit -Hn). "
                "HINT: submit it in parts."
            )


@contextlib.contextmanager
def _new_submission(paths: SweepPaths) -> Iterator[SweepPaths]:
    """The folder of this submission, beside those of earlier ones, whose jobs may still run; gone if it is refused."""
    numbers = [int(p.name) for p in paths.sweep.iterdir() if p.name.isdigit()]
    for earlier in (SweepPaths(paths.root, paths.name, number) for number in numbers):
        if not earlier.points.exists():  # killed before it could submit anything
            shutil.rmtree(earlier.logs)
    new = SweepPaths(paths.root, paths.name, max(numbers, default=0) + 1)
    new.create()
    try:
        yield new
    except SchedulerError:
        shutil.rmtree(new.logs)
        raise


@contextlib.contextmanager
def _all_frozen(runs: Sequence[RunPaths], specs: Sequence[Spec]) -> Iterator[None]:
    """`submission.frozen` for many runs."""
    before = _each(lambda run: run.spec.read_bytes() if run.spec.exists() else None, runs)
    pairs = list(zip(runs, before, strict=True))
    try:
        _each(lambda pair: freeze(*pair), list(zip(runs, specs, strict=True)))
        yield
    except Exception:
        _each(lambda pair: submission.put_back(*pair), pairs)
        raise


def _record(paths: SweepPaths, run: RunPaths, job_id: str, code: str) -> None:
    """The event, and a link to the task's output, which Slurm can only write into one folder for the whole array."""
    submission.record(run, job_id, "slurm", code, sweep=str(paths.logs.relative_to(paths.root)))
    output = f"{job_id}_0_log.out"
    with contextlib.suppress(OSError):
        (run.slurm / output).symlink_to(os.path.relpath(paths.slurm / output, run.slurm))


def _each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _rows(sweep: Sweep, plan: Plan, job_id: str | None, on_slurm: bool) -> list[dict[str, Any]]:
    """What became of each point, for --json."""
    index = {point.run: number for number, point in enumerate(plan.left)}
    finished = {point.run for point in plan.finished}
    rows = []
    for point in sweep.points:
        state = "finished" if point.run in finished else "left out" if point.run in plan.busy else "submitted"
        row = {"run": point.run, "state": state, "job_id": None, "values": point.values}
        if state == "submitted" and on_slurm:
            row["job_id"] = f"{job_id}_{index[point.run]}"
        if point.run in plan.busy:
            row["reason"] = plan.busy[point.run]
        rows.append(row)
    return rows


def _describe(answer: dict[str, Any], plan: Plan) -> str:
    """The answer for people."""
    total = len(answer["points"])
    counts = [f"{len(plan.finished)} of {total} finished"] if plan.finished else []
    counts += [f"{len(plan.busy)} of {total} queued, running or being submitted"] if plan.busy else []
    lines = [f"{key:12} {value}" for key, value in answer.items() if key != "points" and value is not None]
    points = f"{len(plan.left)} submitted" if plan.left else "nothing is left to submit"
    lines.insert(1, f"{'points':12} " + ", ".join([points, *counts]))
    reasons = [f"{'left out':12} {reason}" for reason in plan.busy.values()]
    more = [f"{'':12} and {len(reasons) - SHOWN_POINTS} more"] if len(reasons) > SHOWN_POINTS else []
    return "\n".join([*lines, *reasons[:SHOWN_POINTS], *more])
