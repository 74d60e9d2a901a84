"""Choosing the checkpoint that an attempt resumes from, and cleaning up the run's folders first."""

import os
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_hpc.errors import RunFailedError
from cifar_hpc.files import open_regular, remove_leftovers, try_flock
from cifar_hpc.runs.events import Checkpoint, Fallback, Mended
from cifar_hpc.runs.frozen_spec import check_epochs
from cifar_hpc.runs.history import History
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.store import BEST, Found, duplicate, misnamed, newest_good, step_name
from cifar_hpc.training.context import Context

# Damaged files that are kept for inspection.
DAMAGED_KEPT = 3
# A rank waits so long to see the file that rank 0 sees: an NFS client trusts its cache for up to a minute (nfs(5),
# acregmax).
PATIENCE_SECONDS = 90.0


@dataclass(frozen=True)
class Choice:
    """The checkpoint that rank 0 has chosen: its path, the digest of its content, and on rank 0 the content itself."""

    path: Path
    digest: str
    state: TrainingState | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the state out of what is sent to other ranks, which read the file themselves."""
        return {**vars(self), "state": None}

    def read(self, patience_seconds: float = PATIENCE_SECONDS) -> TrainingState:
        """Return the same state on every rank.

        Raises:
            RunFailedError: this rank sees another file, or none.
        """
        if self.state is not None:
            return self.state
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                state = read_checkpoint(self.path)
                if state.digest == self.digest:
                    return state
                reason = f"its digest is {state.digest[:12]}..., that of rank 0's {self.digest[:12]}..."
            except (BadFileError, OSError) as error:
                reason = str(error)
            if time.monotonic() >= deadline:
                raise RunFailedError(
                    f"{self.path}: rank 0 has chosen it, but {socket.gethostname()} sees another file there: {reason}. "
                    "HINT: is checkpoints/ one file system that all nodes share?"
                )
            time.sleep(0.5)
            with suppress(OSError):
                os.listdir(self.path.parent)  # noqa: PTH208 - makes an NFS client look again


def choose(context: Context) -> Choice | None:
    """Choose the newest good checkpoint; None in a new run. Damaged files are set aside and logged.

    Only for the process that holds the run's lock.

    Raises:
        RunFailedError: there are, or were, checkpoints and none is good.
        SpecError: the run has done more epochs than its spec has.
    """
    directory = context.paths.checkpoints
    tidy_logs(context.paths)
    remove_leftovers(directory)
    found = newest_good(directory, context.spec)
    for path in misnamed(directory):
        context.log.warn(f"{path.name} is not a name that a run gives its checkpoints; it is left alone")
    if found is None:
        _check_new(context)
        return None
    check_epochs(context.spec, context.paths.name, found.state.epoch, found.state.step_in_epoch)
    for path, reason in found.bad:
        aside = set_aside(path)
        context.emit(Fallback(file=path.name, moved_to=aside.name, reason=reason, restored_from=None))
        context.log.warn(f"checkpoint {path.name}: {reason}; kept as {aside.name}, going back to {found.path.name}")
    _mend_best(context, found)
    forget_damaged(directory)
    return Choice(found.path, found.state.digest, found.state)


def tidy_logs(paths: RunPaths) -> None:
    """Remove the temporary files of killed processes from logs/<run>. Those of living processes stay."""
    for folder in (paths.logs, paths.slurm / "rendezvous"):
        remove_leftovers(folder)
    # Copies of the code are folders, which not every file system can lock. The process making one holds this lock.
    with suppress(OSError), os.fdopen(open_regular(paths.logs / "submit.lock", os.O_RDWR | os.O_CREAT), "rb") as lock:
        if try_flock(lock.fileno()):
            for copy in paths.code.glob(".*.tmp"):
                shutil.rmtree(copy, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that retention and later attempts ignore it. Return the new path, or the old one if
    renaming fails."""
    number, aside = 0, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{number}.damaged")
    try:
        return path.rename(aside)
    except OSError:
        return path


def forget_damaged(directory: Path) -> None:
    """Remove all damaged files but the DAMAGED_KEPT newest ones. Folders are never removed."""
    files = [path for path in directory.glob("*.damaged") if path.is_symlink() or not path.is_dir()]
    for path in sorted(files, key=lambda path: path.lstat().st_ctime_ns, reverse=True)[DAMAGED_KEPT:]:
        path.unlink(missing_ok=True)


def _check_new(context: Context) -> None:
    last = History.read(context.paths.events).last_of(Checkpoint)
    if last:
        raise RunFailedError(
            f"{context.paths.checkpoints}: holds no checkpoint any more, but the run has written some, the last one "
            f"({last.get('file')}) at {last.get('time')}. HINT: bring the folder back (is its file system mounted?); "
            f"to start from step 0, remove {context.paths.logs} as well, or choose another --name."
        )


def _mend_best(context: Context, found: Found) -> None:
    """Make best.pt the checkpoint of the best epoch of the state, as in a run without interruption."""
    directory, state = context.paths.checkpoints, found.state
    best = directory / BEST
    if found.path == best:
        with suppress(OSError):  # so that retention and `inspect` find it among the others
            duplicate(best, directory / step_name(state.step))
        return
    epoch = state.best["epoch"]
    step = state.rows[epoch - 1]["step"] if epoch else 0
    reason, damaged = _fault_of_best(best, step)
    if reason is None:
        return
    aside = set_aside(best).name if damaged else None
    source = directory / step_name(step)
    try:
        read_checkpoint(source)
        duplicate(source, best)
    except (BadFileError, RunFailedError, OSError):
        restored, then = None, f"no other file holds that epoch ({epoch}); {BEST} comes back with the next better one"
    else:
        restored, then = source.name, f"made again from {source.name}"
    event = Fallback if damaged else Mended
    context.emit(event(file=BEST, moved_to=aside, reason=reason, restored_from=restored))
    context.log.warn(f"{BEST}: {reason}" + (f"; kept as {aside}" if aside else "") + f"; {then}")


def _fault_of_best(best: Path, step: int) -> tuple[str | None, bool]:
    """Return the reason why best.pt does not hold the best epoch, or None, and True if it is damaged.

    Args:
        step: of the best epoch's checkpoint; 0 if there is no best epoch yet.
    """
    if not os.path.lexists(best):
        return ("is missing" if step else None), False
    try:
        held = read_checkpoint(best).step
    except (BadFileError, RunFailedError) as error:
        return str(error), True
    # If it is of a later step, its epoch will be computed again.
    return (f"is of step {held}, but the best epoch's is {step}" if held < step else None), False
