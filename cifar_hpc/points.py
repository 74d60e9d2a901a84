"""Which run each task of a sweep's job array trains: logs/sweeps/<sweep>/<number>/points.json, in the array's order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cifar_hpc.errors import SpecError
from cifar_hpc.jsonfile import read_regular, write_atomic
from cifar_hpc.paths import SweepPaths, is_run_name


def write_points(paths: SweepPaths, runs: Sequence[str]) -> None:
    """Say which runs the array's indexes 0, 1, 2 ... stand for."""
    write_atomic(paths.points, (json.dumps(list(runs), indent=0) + "\n").encode())


def read_points(file: Path) -> list[str]:
    """The names of the runs, by index.

    Raises:
        SpecError: where the file is missing or is no such list.
    """
    try:
        names = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: cannot be read: {error}. HINT: submit the sweep again.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and is_run_name(name) for name in names):
        raise SpecError(f"{file}: holds no list of names of runs. HINT: submit the sweep again.")
    return names


def run_at(file: Path, index: str) -> str:
    """The run that a task of the array trains.

    Args:
        index: as SLURM_ARRAY_TASK_ID has it.

    Raises:
        SpecError: as `read_points`, and where there is no such point.
    """
    names = read_points(file)
    if not (index.isascii() and index.isdigit() and int(index) < len(names)):
        raise SpecError(f"{file}: has {len(names)} points and none of index {index!r}.")
    return names[int(index)]
