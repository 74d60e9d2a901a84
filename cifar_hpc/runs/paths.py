"""Files and folders of a run, of a sweep, and of the project."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.files import DIRECTORY_MODE, expand_path, read_regular, write_atomic
from cifar_hpc.text import control_character, counted, shown

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parent  # or, in a job, the folder of the run's code snapshot


def package_files() -> list[Path]:
    """The package's files, without hidden ones such as an editor's locks, which are links to nothing."""
    return sorted(file for file in PACKAGE.rglob("*.py") if not file.name.startswith("."))


def project_root() -> Path:
    """Folder of checkpoints/ and logs/: $CIFAR_HPC_ROOT, else the folder that holds the package.

    Raises:
        SpecError: for a path that a batch script or the file name pattern of sbatch's --output cannot contain.
    """
    given = os.environ.get("CIFAR_HPC_ROOT") or str(PROJECT)
    # A shell has replaced variables already: in a whole path a '$' is part of a name.
    root = Path(given if given.startswith("/") else expand_path(given, "CIFAR_HPC_ROOT")).resolve()
    if control_character(str(root)) is not None or "%" in str(root) or "\\" in str(root):
        key = "CIFAR_HPC_ROOT" if os.environ.get("CIFAR_HPC_ROOT") else "the project's folder"
        raise SpecError(
            f"{key}: {shown(str(root))} is not allowed; allowed: a path in UTF-8 without control characters, '%' and "
            "'\\', which mean something else in the names of Slurm's output files. HINT: set CIFAR_HPC_ROOT to another "
            "folder."
        )
    return root


def program() -> str:
    """Beginning of a command line that works in the current folder, with `python` if that is this Python."""
    folder = "" if Path.cwd() == PROJECT else f"cd {shlex.quote(str(PROJECT))} && "
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
    return f"{folder}{python} -m cifar_hpc"


def keep_others_out() -> None:
    """Restrict the umask: other users may not write files of this process and its children."""
    os.umask(os.umask(0o077) | 0o002)


SWEEPS = "sweeps"  # the only folder of logs/ that belongs to no run


def is_run_name(name: str) -> bool:
    """Check that `name` can be a directory, a Slurm job name and a word in a shell."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None and name != SWEEPS


def check_run_name(name: str) -> str:
    """Return `name` if it can name a run.

    Raises:
        SpecError: says which names are allowed.
    """
    if is_run_name(name):
        return name
    raise SpecError(
        f"--name: {shown(name)} is not allowed; allowed: up to 100 letters, digits, '.', '_' and '-', "
        f"beginning with a letter or a digit, but not {SWEEPS}. "
        "HINT: without --name it is made from the job file's name."
    )


class _InLogs:
    """Attribute of a class with `logs`: the path of a file or folder in there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: RunPaths | SweepPaths, owner: type) -> Path:
        return paths.logs / self.name


@dataclass(frozen=True)
class RunPaths:
    """Files of one run."""

    root: Path
    name: str

    spec = _InLogs("spec.yaml")
    train_log = _InLogs("train.log")
    metrics = _InLogs("metrics.jsonl")
    events = _InLogs("events.jsonl")
    progress = _InLogs("progress.json")
    lock = _InLogs("run.lock")
    code = _InLogs("code")
    user_code = _InLogs("code/user")
    slurm = _InLogs("slurm")
    tracking = _InLogs("tracking")

    @cached_property  # `status` joins ten paths for each of thousands of runs
    def logs(self) -> Path:
        return self.root / "logs" / self.name

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def owner(self) -> Path:
        return self.checkpoints / "owner.lock"

    def create(self) -> None:
        """Create the directories.

        Raises:
            SpecError: names the directory that cannot be created or written.
        """
        _make(self.logs, self.checkpoints, self.slurm)


@dataclass(frozen=True)
class SweepPaths:
    """Files of one submission of a sweep; its points have those of any run."""

    root: Path
    name: str
    number: int = 1  # of the submission

    points = _InLogs("points.json")
    code = _InLogs("code")
    slurm = _InLogs("slurm")

    @property
    def sweep(self) -> Path:
        return self.root / "logs" / SWEEPS / self.name

    @property
    def logs(self) -> Path:
        return self.sweep / str(self.number)

    def create(self) -> None:
        """Create the directories, as `RunPaths.create`."""
        _make(self.logs, self.slurm)


def _make(*directories: Path) -> None:
    for directory in directories:
        try:
            directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"{directory}: cannot be made: {error.strerror}. HINT: set CIFAR_HPC_ROOT to a folder you can write."
            ) from None
        if not os.access(directory, os.W_OK | os.X_OK):
            raise SpecError(f"{directory}: is not writable by you. HINT: set CIFAR_HPC_ROOT to a folder you can write.")


def all_runs(root: Path) -> list[RunPaths]:
    """List the runs that have a spec, by name."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / "logs") as entries:
        names = [e.name for e in entries if is_run_name(e.name) and os.access(f"{e.path}/spec.yaml", os.F_OK)]
    return [RunPaths(root, name) for name in sorted(names)]


def find_run(root: Path, name: str) -> RunPaths:
    """Find the run `name`, or the only one that begins so.

    Raises:
        SpecError: if there is none or several begin so; lists them, or all runs and the nearest name.
    """
    paths = RunPaths(root, name)
    if is_run_name(name) and (paths.logs.is_dir() or paths.checkpoints.is_dir()):
        return paths
    names = [r.name for r in all_runs(root)]
    begun = [other for other in names if is_run_name(name) and other.startswith(name)]
    if len(begun) == 1:
        return RunPaths(root, begun[0])
    if begun:
        some = ", ".join(begun[:10]) + (", ..." if len(begun) > 10 else "")
        raise SpecError(f"{name}: {len(begun)} runs begin so: {some}. HINT: more of the name, or '{name}*' for all.")
    known = ", ".join([*names[:10], *["..."] * (len(names) > 10)]) or "none yet"
    raise SpecError(f"{shown(name)}: no such run under {root / 'logs'}; there are: {known}." + nearest(name, names))


def find_runs(root: Path, patterns: Sequence[str], more: Sequence[str] = ()) -> list[RunPaths]:
    """Find the runs that match any of `patterns`, each once, by name.

    Args:
        patterns: names, as `find_run` takes them, or patterns with *, ? and [...] as in fnmatch(3).
        more: names to find beside those of runs that are whole.

    Raises:
        SpecError: if no run matches a pattern.
    """
    names = {run.name for run in all_runs(root)}.union(more) if any(map(is_pattern, patterns)) else set()
    found: set[str] = set()
    for pattern in patterns:
        matching = set(fnmatch.filter(names, pattern)) if is_pattern(pattern) else {pattern}.intersection(more)
        found |= matching or {find_run(root, pattern).name}
    return [RunPaths(root, name) for name in sorted(found)]


def is_pattern(text: str) -> bool:
    """Check for characters of a pattern, which no run's name contains."""
    return any(character in text for character in "*?[")


def write_points(paths: SweepPaths, runs: Sequence[str]) -> None:
    """Write the names of the runs that the indexes 0, 1, 2, ... of a job array train."""
    write_atomic(paths.points, (json.dumps(list(runs), indent=0) + "\n").encode())


def read_points(file: Path) -> list[str]:
    """Read the names of the runs, by index.

    Raises:
        SpecError: if the file is missing or is no such list.
    """
    try:
        names = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: cannot be read: {error}. HINT: submit the sweep again.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and is_run_name(name) for name in names):
        raise SpecError(f"{file}: holds no list of names of runs. HINT: submit the sweep again.")
    return names


def sweep_order(root: Path) -> dict[str, tuple[str, int]]:
    """Sweep and place in the order of its job file, by the run's name, of the points of all sweeps under `root`."""
    files = (root / "logs" / SWEEPS).glob("*/*/points.json")
    numbered = (file for file in files if re.fullmatch(r"[0-9]{1,9}", file.parts[-2]))  # not a copy that a user keeps
    order: dict[str, tuple[str, int]] = {}
    # A later submission of a sweep has those of its points that had not finished, and new ones.
    for file in sorted(numbered, key=lambda file: (file.parts[-3], int(file.parts[-2]))):
        with contextlib.suppress(SpecError):
            for name in read_points(file):
                order.setdefault(name, (file.parts[-3], len(order)))
    return order


def same_folder(one: Path, other: Path) -> bool | None:
    """Compare two folders, which may be one under two names (a link, a bind mount); None if one is not found here."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return None


def array_points(root: Path, folder: Path) -> tuple[list[str], bool | None]:
    """Read the runs of a job array by index, and whether `folder`, from which it was submitted, is the one of `root`.

    The list is empty if it is not a sweep's.
    """
    if folder.parent.parent.name != SWEEPS or not re.fullmatch(r"[0-9]{1,9}", folder.name):
        return [], False
    ours = SweepPaths(root, folder.parent.name, int(folder.name))
    try:
        return read_points(ours.points), same_folder(folder, ours.logs)
    except SpecError:  # removed, while its jobs are still there; or another root's
        return [], False


def run_of_task(root: Path, target: str) -> RunPaths:
    """Files of the run that this task of a job trains.

    Args:
        target: name of the run, or path of a sweep's points.json, in which SLURM_ARRAY_TASK_ID is the task's index.

    Raises:
        SpecError: as `read_points`, and if there is no such point.
    """
    if "/" not in target:
        return RunPaths(root, target)
    names, index = read_points(Path(target)), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not (index.isascii() and index.isdigit() and int(index) < len(names)):
        raise SpecError(f"{target}: has {counted(len(names), 'point')} and none of index {index!r}.")
    return RunPaths(root, names[int(index)])
