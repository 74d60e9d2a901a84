"""python -m cifar_hpc rm: delete runs.

Logs, checkpoints and code snapshot of each run, for good; of a sweep also what
its runs shared, with its last run, and whatever a killed rm has left. A run
that is under way or in the queue is refused. Says what would go, and asks,
unless --yes is given.
"""

import argparse
import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_hpc.cli.du import REMOVED, disk_use, everything, size
from cifar_hpc.errors import RunBusyError, SchedulerError, SpecError
from cifar_hpc.launch.preflight import why_busy
from cifar_hpc.runs.events import Cancelled, Failed, Finished, Submitted
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import WriterLock, lock_submission
from cifar_hpc.runs.paths import SWEEPS, RunPaths, find_runs, is_run_name, project_root, read_points
from cifar_hpc.runs.queue import jobs_of
from cifar_hpc.text import counted

EXAMPLES = ("improved_resnet-1a2b3c4d", "'dropout-*' try --yes")
AT_ONCE = 100  # runs, each with three open locks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def main(arguments: argparse.Namespace) -> int:
    """Delete runs.

    Raises:
        SpecError: no run matches a pattern, a folder may not be written, or nobody can be asked.
        RunBusyError: a run is under way or in the queue.
        SchedulerError: Slurm does not say whether one is.
    """
    root = project_root()
    names = everything(root)
    left = [name for name in names if name.endswith(REMOVED)]
    known = [*filter(is_run_name, names), *(name[1:].rsplit(".", 2)[0] for name in left)]
    found = find_runs(root, arguments.runs, known)
    runs = [run for run in found if run.logs.exists() or run.checkpoints.exists()]
    _require_free(runs)
    uses = disk_use(root, [*(run.name for run in runs), *left])
    what = counted(len(runs), "run") + (f" and {counted(len(left), 'leftover')} of a killed rm" if left else "")
    what += f", {size(sum(use.total for use in uses))}"
    for use in uses:
        print(f"{use.name}: {size(use.total)}, of which checkpoints {size(use.checkpoints)}")
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise SpecError(f"nothing is deleted: without a terminal nobody can be asked about {what}. HINT: --yes")
        with contextlib.suppress(EOFError):
            if input(f"Delete {what}, for good? [y/N] ").strip().lower() in ("y", "yes"):
                arguments.yes = True
        if not arguments.yes:
            print("nothing is deleted")
            return 0
    for hidden in left:
        for kind in ("logs", "checkpoints"):
            shutil.rmtree(root / kind / hidden, ignore_errors=True)
    done = 0
    try:
        for begin in range(0, len(runs), AT_ONCE):
            _delete(runs[begin : begin + AT_ONCE])
            done += len(runs[begin : begin + AT_ONCE])
        _delete_sweeps(root, {run.name for run in runs})
    finally:
        print(f"deleted: {what}" if done == len(runs) else f"deleted: {done} of {len(runs)} runs")
    return 0


def _require_free(runs: Sequence[RunPaths]) -> None:
    jobs = jobs_of(runs)
    for run in runs:
        if reason := why_busy(run, jobs):
            raise RunBusyError(f"nothing of these {len(runs)} is deleted: {reason}")
        history = History.read(run.events)
        ended = history.state.get("event") in (Finished.name, Failed.name, Cancelled.name)
        if not ended and history.last_of(Submitted).get("scheduler") == "slurm" and shutil.which("squeue") is None:
            hint = "HINT: delete it on a login node."
            raise SchedulerError(f"run {run.name} was submitted to Slurm, which is not here to say if it ended. {hint}")
        for folder in (run.logs, run.checkpoints):
            for path in (folder.resolve(), folder.resolve().parent) if folder.exists() else ():
                if not os.access(path, os.W_OK | os.X_OK):
                    raise SpecError(f"{path}: is not writable by you, so run {run.name} cannot be deleted.")


def _delete(runs: Sequence[RunPaths]) -> None:
    """Delete runs, unless one of them has been submitted or started meanwhile.

    The logs go first, by a rename: then it is a run no more. What a killed rm leaves are checkpoints without a run,
    from which a submission goes on (and says so) and which rm takes, or folders of hidden names. Until both folders are
    away their locks keep out whoever would begin the run again.
    """
    hidden = []
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.callback(lock_submission(run.logs, f"run {run.name}").release)
        _require_free(runs)
        for run in runs:
            writer = WriterLock(run)
            writer.acquire({"pid": os.getpid(), "host": socket.gethostname()})
            locks.callback(writer.release)
        for run in runs:
            hidden += [_hide(run.logs), _hide(run.checkpoints)]
    for folder in hidden:  # without open files, which NFS would keep
        while folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another rm takes it for a leftover
                shutil.rmtree(folder)


def _hide(folder: Path) -> Path:
    """Rename a folder, or the one to which it links, to a name that no run has."""
    real = folder.resolve()
    hidden = real.with_name(f".{real.name}.{os.urandom(4).hex()}{REMOVED}")
    real.rename(hidden)
    if folder.is_symlink():
        folder.unlink()
    return hidden


def _delete_sweeps(root: Path, deleted: set[str]) -> None:
    """Delete what submissions of sweeps share of which no run is left."""
    for file in sorted((root / "logs" / SWEEPS).glob("*/*/points.json")):
        sweep = file.parent.parent
        with contextlib.suppress(SpecError, RunBusyError):  # no list of points; one that is submitted again just now
            points = set(read_points(file))
            if points & deleted and not any((root / "logs" / name).exists() for name in points):
                lock = lock_submission(sweep, f"sweep {sweep.name}")
                shutil.rmtree(file.parent)
                alone = not any(path.is_dir() for path in sweep.iterdir())
                lock.release()
                if alone:
                    shutil.rmtree(sweep)
