"""Frozen spec of a run: every later start must compute the same."""

import dataclasses
from pathlib import Path
from typing import Any

from cifar_hpc.config import user_code
from cifar_hpc.config.io import HERE, check_resumable, from_plain, to_yaml, user_files
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.validate import check
from cifar_hpc.config.yaml_loader import read_sections
from cifar_hpc.errors import SpecError
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.events import Checkpoint
from cifar_hpc.runs.history import History
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.text import counted


def read_frozen(paths: RunPaths) -> Spec | None:
    """Read logs/<run>/spec.yaml; None in a new run.

    Raises:
        SpecError: if it cannot be read or is no spec.
    """
    if not paths.spec.exists():
        return None
    if not paths.spec.is_file():  # reading a FIFO would wait for a writer
        raise SpecError(f"{paths.spec}: is no regular file. HINT: find out who put it there, and remove it.")
    return from_plain(read_sections(paths.spec))


def require_frozen(paths: RunPaths) -> Spec:
    """Read logs/<run>/spec.yaml, which every submitted run has.

    Raises:
        SpecError: as `read_frozen`, and if it is missing.
    """
    spec = read_frozen(paths)
    if spec is None:
        raise SpecError(f"{paths.spec} is missing. HINT: submit the run again.")
    return spec


def resolve(paths: RunPaths, spec: Spec, tasks: int, cpu_threads: int) -> Spec:
    """Fill in what the first start of a run fixes, and check `spec` against it.

    Args:
        tasks: processes of this start; the number of shards if it is the first and the spec leaves that open.
        cpu_threads: threads of a process; likewise.

    Raises:
        SpecError: if the run was started under a spec that computes something else, has done more epochs than `spec`
            has, or has fewer shards than tasks.
    """
    # Nothing is fixed by a submission that was killed half-way, or whose job never got as far as training.
    history = History.read(paths.events)
    begun = any(attempt.begun for attempt in history.attempts)
    old = read_frozen(paths) if begun or any(paths.checkpoints.glob("step_*")) else None
    # Where the logs were lost, a frozen spec under which no start got that far may be a wrong one, of which each start
    # tells by the checkpoints.
    if old is not None and (begun or not history.attempts):
        check_resumable(old, spec, paths.name)
    saved = history.last_of(Checkpoint)
    check_epochs(spec, paths.name, saved.get("epoch"), saved.get("step_in_epoch"))
    fixed = (old or spec).train
    train = dataclasses.replace(
        spec.train,
        shards=spec.train.shards or fixed.shards or tasks,
        cpu_threads=spec.train.cpu_threads or fixed.cpu_threads or cpu_threads,
    )
    data = dataclasses.replace(spec.data, image_size=spec.data.image_size or (old or spec).data.image_size)
    assert train.shards is not None
    if tasks > train.shards:
        said = ", which the run's first start has fixed" if old is not None else ""
        other = "begin a new run, under another --name, with" if old is not None else "use"
        raise SpecError(
            f"{tasks} ranks are more than train.shards: {train.shards}{said}. HINT: start at most "
            f"{counted(train.shards, 'rank')}, or {other} --set train.shards={tasks}."
        )
    return check(dataclasses.replace(spec, train=train, data=data))


def check_epochs(spec: Spec, run: str, epoch: Any, step_in_epoch: Any) -> None:
    """Refuse a spec of fewer epochs than the run has done, the one under way included.

    Args:
        epoch, step_in_epoch: of the newest checkpoint, as far as they are known.

    Raises:
        SpecError: says how many epochs are done.
    """
    if not (isinstance(epoch, int) and isinstance(step_in_epoch, int)):
        return
    done = counted(epoch, "epoch") + (f" and {counted(step_in_epoch, 'step')}" if step_in_epoch else "")
    least = epoch + (step_in_epoch > 0)
    if spec.train.epochs < least:
        raise SpecError(
            f"train.epochs: {spec.train.epochs} is not allowed; allowed: {least} or more, since run {run} has done "
            f"{done}. HINT: another --name for a run of fewer epochs."
        )


def freeze(paths: RunPaths, spec: Spec, job_folder: Path = HERE) -> None:
    """Write logs/<run>/spec.yaml, and copy the user's files that the spec names from the job file's folder."""
    for files in user_files(spec, job_folder).values():
        user_code.write(files, paths.user_code)
    header = f"The frozen spec of run {paths.name}. Every start of the run reads it; edit the job file instead."
    write_atomic(paths.spec, to_yaml(spec, header).encode())
