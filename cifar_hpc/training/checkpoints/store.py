"""The checkpoint folder of a run: its files, its index, and the thread that writes them."""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc import tensorfile
from cifar_hpc.config.io import check_resumable, from_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.files import (
    make_again,
    read_regular,
    remove_leftovers,
    replacing,
    sync_directory,
    temporary_name,
    write_atomic,
)
from cifar_hpc.runs.events import Checkpoint, CheckpointFailed, Event
from cifar_hpc.runs.logs import utc_now
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import one_line
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint

BEST = "best.pt"
INDEX = "index.json"

# ------------------------------------------------------------ files


def step_name(step: int) -> str:
    """Return the file name of the checkpoint after `step` steps."""
    return f"step_{step:08d}.pt"


def candidates(directory: Path) -> list[Path]:
    """List the checkpoint files by step, newest first. Files with a name that no run writes are left out."""
    return [path for step, path in reversed(_numbered(directory)) if path.name == step_name(step)]


def misnamed(directory: Path) -> list[Path]:
    """List files such as step_18.pt, a name that no run writes. They are neither read nor removed."""
    return [path for step, path in _numbered(directory) if path.name != step_name(step)]


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(directory)  # noqa: PTH208 - Path.glob hides that a folder is not readable
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFailedError(
            f"{directory}: cannot be read: {error.strerror}. HINT: this folder should hold the run's checkpoints; "
            "without reading it the run does not start from step 0."
        ) from None
    return sorted((int(m[1]), directory / name) for name in names if (m := re.fullmatch(r"step_([0-9]+)\.pt", name)))


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, and the newer files that failed verification, each with the reason."""

    path: Path
    state: TrainingState
    bad: list[tuple[Path, str]]


def newest_good(directory: Path, spec: Spec | None = None) -> Found | None:
    """Find the newest checkpoint that verifies; None in a new run. Changes nothing.

    best.pt holds a whole state as well, and is used if it is newer than all good step files.

    Args:
        spec: of the run that is to go on: a file of another one is not good.

    Raises:
        RunFailedError: there are checkpoints and none is good. A silent restart from step 0 would lose the run.
    """
    found: Found | None = None
    bad: list[tuple[Path, str]] = []
    paths = candidates(directory)
    for path in paths:
        try:
            state = _read_own(path, spec)
            if path.name != step_name(state.step):
                raise BadFileError(f"holds step {state.step}, which is not what its name says")
            found = Found(path, state, bad)
            break
        except BadFileError as error:
            if os.path.lexists(path):  # otherwise the running job has removed it meanwhile
                bad.append((path, str(error)))
    if found is None and not bad and paths and candidates(directory):
        return newest_good(directory, spec)  # all were removed while newer ones were written
    best = directory / BEST
    if (bad or found is None) and os.path.lexists(best):
        try:
            state = _read_own(best, spec)
            if found is None or state.step > found.state.step:
                return Found(best, state, bad)
        except (BadFileError, RunFailedError) as error:
            if found is None:
                bad.append((best, str(error)))
    if found is None:
        bad += [(path, "not a name that a run gives its checkpoints") for path in misnamed(directory)]
    if found is None and bad:
        raise RunFailedError(
            "no checkpoint of the run is good; tried, newest first:\n"
            + "\n".join(f"  {path}: {reason}" for path, reason in bad)
            + "\nHINT: restore one from a backup; to start from step 0, move these and the run's logs away. If the "
            f"spec that was submitted is wrong: remove logs/{directory.name}/spec.yaml, and submit the right one."
        )
    return found


def _read_own(path: Path, spec: Spec | None) -> TrainingState:
    state = read_checkpoint(path)
    try:
        if spec is not None:
            check_resumable(from_plain(state.spec), spec, path.parent.name)
    except SpecError as error:
        raise BadFileError(one_line(f"is of another run: {error}")[:500]) from None
    return state


def duplicate(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, in the same folder: a hard link, or a copy where links are not possible.

    Raises:
        OSError: the file cannot be created.
    """
    temporary = temporary_name(target)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:  # a file system without hard links
        with replacing(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
    finally:
        temporary.unlink(missing_ok=True)  # left over where both were the same file already, see rename(2)
    sync_directory(target.parent)


# ------------------------------------------------------------ index

# A file's entry in index.json. Size and mtime_ns show later whether the file is still the same one.
Entry = dict[str, Any]
_TYPES = {"step": int, "epoch": int, "step_in_epoch": int, "sha256": str, "bytes": int, "mtime_ns": int, "time": str}
_MOST_BYTES = 2**22  # of index.json, where an entry takes 300


def read_index(directory: Path) -> dict[str, Entry]:
    """Read the entries of index.json by file name, with that of best.pt; damaged ones are left out."""
    try:
        long = (directory / INDEX).stat().st_size > _MOST_BYTES
        index = {} if long else json.loads(read_regular(directory / INDEX))
        entries = {**index["checkpoints"], BEST: index.get("best")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in _TYPES.items())
    }


def update_index(directory: Path, names: Sequence[str], new: dict[str, Entry]) -> None:
    """Make index.json list the checkpoints `names` and best.pt.

    Args:
        new: entries of files written just now. Other entries are kept where they match the file, and made from the
            file otherwise.

    Raises:
        OSError: it cannot be written.
    """
    known = {**read_index(directory), **new}
    current = {name: _current_entry(directory / name, known.get(name)) for name in [*sorted(names), BEST]}
    entries = {name: entry for name, entry in current.items() if entry is not None}
    best = entries.pop(BEST, None)
    index = {"checkpoints": entries, "best": {"file": BEST, **best} if best is not None else None}
    content = (json.dumps(index, indent=1) + "\n").encode()
    with suppress(OSError):
        if read_regular(directory / INDEX) == content:
            return
    write_atomic(directory / INDEX, content)


def _current_entry(path: Path, known: Entry | None) -> Entry | None:
    """Return the entry of a file: `known` if it matches the file, else a new one; None if the file is not good."""
    with suppress(OSError, BadFileError, RunFailedError):
        status = path.stat()
        if known is not None and (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return {key: known[key] for key in _TYPES}
        state = read_checkpoint(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        written = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="milliseconds")
        return _make_entry(path, state, sha256, written.replace("+00:00", "Z"))
    return None


def _make_entry(path: Path, state: TrainingState, sha256: str, time: str) -> Entry:
    status = path.stat()
    position = {"step": state.step, "epoch": state.epoch, "step_in_epoch": state.step_in_epoch}
    return {**position, "sha256": sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "time": time}


# ------------------------------------------------------------ writing


@dataclass
class _Snapshot:
    """A state waiting to be written.

    Attributes:
        error: reason why its last write failed; it is tried again with the next checkpoint.
        entry: its entry of the index, from the moment that its file is on disk.
    """

    name: str
    state: TrainingState
    best: bool
    error: str | None = None
    entry: Entry | None = None


class CheckpointStore:
    """Writes checkpoints from a background thread, one at a time, without making training wait. Rank 0 only.

    At most two states wait: the newest, which the next one replaces, and the next best.pt, which only a better one
    replaces. The best one is the older of the two and is written first, so that no kill leaves a checkpoint without
    the best.pt that belongs to it. A failed write is repeated with the next checkpoint. Host memory holds at most
    three states (two waiting, and one being written after it was replaced), the held one, and that of the caller.

    Args:
        directory: checkpoints/<run>.
        keep: newest files to keep, beside best.pt.
        emit: called from the writing thread with the event of each durable checkpoint, and of each failed write.
        warn: called with a line of text about a problem; training continues.
    """

    def __init__(self, directory: Path, keep: int, emit: Callable[[Event], None], warn: Callable[[str], None]) -> None:
        self.directory, self.keep, self.emit, self.warn = directory, keep, emit, warn
        self.bytes_written = 0  # grows while a checkpoint is being written
        self._lock = threading.Lock()
        self._held: _Snapshot | None = None  # the next best.pt, until the next write
        self._best: _Snapshot | None = None
        self._newest: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._tidy({})

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None

    @property
    def best_error(self) -> str | None:
        """Reason why best.pt is out of date; None if it is up to date, or not yet tried."""
        return self._best.error if self._best is not None else None

    def holds(self, step: int) -> bool:
        """Return True if the checkpoint after `step` steps is on disk, or waiting to be written."""
        name, newest = step_name(step), self._newest
        return (newest is not None and newest.name == name) or (self.directory / name).is_file()

    def save(self, state: TrainingState, best: bool = False) -> None:
        """Start to write `state`, whose tensors lie in host memory and do not change any more. Returns at once."""
        snapshot = _Snapshot(step_name(state.step), state, best)
        with self._lock:
            if best:
                self._held = snapshot
            self._newest = snapshot
            self._start()

    def hold(self, state: TrainingState) -> None:
        """Keep `state`, as `save` takes it, for best.pt. It is written before the next checkpoint, or in `wait`."""
        self._held = _Snapshot(step_name(state.step), state, True)

    def wait(self, alive: Callable[[], None] = lambda: None) -> str | None:
        """Wait until all is written, after one more try of what failed. Return the error of the newest state, if any.

        Args:
            alive: called now and then while the writing makes progress.
        """
        with self._lock:
            if self._held is not None or any(snapshot.error is not None for snapshot in self._waiting()):
                self._start()
        seen = -1
        while (thread := self._thread) is not None:
            thread.join(1.0)
            if self.bytes_written != seen:
                seen = self.bytes_written
                alive()
        newest = self._newest
        return newest.error or "it was not tried" if newest is not None and newest.entry is None else None

    def _waiting(self) -> list[_Snapshot]:
        return [snapshot for snapshot in (self._best, self._newest) if snapshot is not None]

    def _start(self) -> None:
        self._best, self._held = self._held or self._best, None
        for snapshot in self._waiting():
            snapshot.error = None
        if self._thread is None:
            # Not a daemon thread: the interpreter waits for the file before it exits.
            thread = threading.Thread(target=self._work, name="checkpoint")
            thread.start()
            self._thread = thread

    def _work(self) -> None:
        try:
            while (snapshot := self._next()) is not None:
                error = self._write(snapshot)
                with self._lock:
                    snapshot.error = error
                    if error is None and self._best is snapshot:
                        self._best = None
                    if error is None and self._newest is snapshot:
                        self._newest = None
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None  # after an error, which the interpreter prints

    def _next(self) -> _Snapshot | None:
        with self._lock:
            for snapshot in self._waiting():
                if snapshot.error is None:
                    return snapshot
            self._thread = None
            return None

    def _write(self, snapshot: _Snapshot) -> str | None:
        """Write one state, and best.pt if it is the best one. Return the error, if any."""
        error = None
        fresh = snapshot.entry is None or not (self.directory / snapshot.name).exists()
        if fresh and (error := self._try(snapshot.name, lambda: self._write_file(snapshot))) is not None:
            return error
        if snapshot.best:
            error = self._try(BEST, lambda: duplicate(self.directory / snapshot.name, self.directory / BEST))
        assert snapshot.entry is not None
        best = {BEST: snapshot.entry} if snapshot.best and error is None else {}
        self._tidy({snapshot.name: snapshot.entry, **best})
        if fresh:
            figures = {key: snapshot.entry[key] for key in ("step", "epoch", "step_in_epoch", "bytes")}
            self.emit(Checkpoint(file=snapshot.name, **figures))
        return error

    def _try(self, name: str, work: Callable[[], None]) -> str | None:
        try:
            try:
                work()
            except FileNotFoundError:  # the folder has just been removed
                work()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room():
                    raise
                work()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.emit(CheckpointFailed(file=name, reason=reason))
            then = "training goes on, and the older checkpoints are kept"
            self.warn(f"checkpoint {name} could not be written: {reason}; {then}")
            return reason
        return None

    def _make_room(self) -> bool:
        """Remove all checkpoints but the newest and best.pt from a full disk; return False if there are no others."""
        old = candidates(self.directory)[1:]
        for path in old:
            with suppress(OSError):
                path.unlink()
        if old:
            self.warn(f"no space left: {len(old)} older checkpoint{'s' * (len(old) > 1)} removed to make room")
        return bool(old)

    def _write_file(self, snapshot: _Snapshot) -> None:
        if not self.directory.is_dir():
            make_again(self.directory.parents[1], self.directory)
            self.warn(f"{self.directory} was gone; it is made again. The checkpoints that were in it are lost")
        path = self.directory / snapshot.name
        with replacing(path) as file:
            sha256 = tensorfile.save(snapshot.state.to_dict(), file, self._advanced)
        snapshot.entry = _make_entry(path, snapshot.state, sha256, utc_now())

    def _advanced(self, count: int) -> None:
        self.bytes_written += count

    def _tidy(self, new: dict[str, Entry]) -> None:
        """Update index.json, and remove all files but the newest `keep`. A failure here loses no checkpoint."""
        try:
            remove_leftovers(self.directory)  # of a writer that was killed, or whose storage failed just then
            paths = candidates(self.directory)
            if paths:
                update_index(self.directory, [path.name for path in paths[: self.keep]], new)
            for path in paths[self.keep :]:
                with suppress(IsADirectoryError):
                    path.unlink(missing_ok=True)
        except (OSError, RunFailedError) as error:
            self.warn(f"{self.directory}: {INDEX} or old files could not be brought up to date: {error}")
