"""Frozen spec of a run: every later start must compute the same."""

import dataclasses
from pathlib import Path

from cifar_hpc.config import user_code
from cifar_hpc.config.io import HERE, check_resumable, from_plain, to_yaml, user_files
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.validate import check
from cifar_hpc.config.yaml_loader import read_sections
from cifar_hpc.errors import SpecError
from cifar_hpc.files import write_atomic
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
        SpecError: if the run was started under a spec that computes something else, or has fewer shards than tasks.
    """
    # Nothing is fixed by a submission that was killed half-way, or whose job never got as far as training.
    begun = any(attempt.begun for attempt in History.read(paths.events).attempts)
    begun = begun or any(paths.checkpoints.glob("step_*"))
    old = read_frozen(paths) if begun else None
    if old is not None:
        check_resumable(old, spec, paths.name)
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


def freeze(paths: RunPaths, spec: Spec, job_folder: Path = HERE) -> None:
    """Write logs/<run>/spec.yaml, and copy the user's files that the spec names from the job file's folder."""
    for files in user_files(spec, job_folder).values():
        user_code.write(files, paths.user_code)
    header = f"The frozen spec of run {paths.name}. Every start of the run reads it; edit the job file instead."
    write_atomic(paths.spec, to_yaml(spec, header).encode())
