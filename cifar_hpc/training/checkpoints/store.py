"""The checkpoint folder of a run: written in the background, atomic, indexed, read back newest good first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc import tensorfile
from cifar_hpc.errors import RunFailedError
from cifar_hpc.files import (
    DIRECTORY_MODE,
    read_regular,
    remove_leftovers,
    replacing,
    sync_directory,
    temporary_name,
    write_atomic,
)
from cifar_hpc.runs.logs import utc_now
from cifar_hpc.tensorfile import BadFileError as BadCheckpointError
from cifar_hpc.training.checkpoints import format as checkpoint

BEST = "best.pt"
INDEX = "index.json"
_KINDS = {"step": int, "epoch": int, "step_in_epoch": int, "sha256": str, "bytes": int, "mtime_ns": int, "time": str}


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, or as much of it as is one: {"checkpoints": {file name: entry}, "best": entry or None}."""
    try:
        index = json.loads(read_regular(directory / INDEX))
        checkpoints, best = dict(index["checkpoints"]), index.get("best")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"checkpoints": {}, "best": None}
    return {
        "checkpoints": {name: entry for name, entry in checkpoints.items() if _is_entry(entry)},
        "best": best if _is_entry(best) else None,
    }


def update_index(directory: Path, names: Iterable[str], new: dict[str, dict[str, Any]]) -> None:
    """Make index.json right for the checkpoints `names` and for best.pt.

    Args:
        new: entries known already, by file name. The others are taken over from the present index where they fit the
            file, and else made anew from it.

    Raises:
        OSError: it cannot be written.
    """
    old = read_index(directory)
    known = {**old["checkpoints"], BEST: old["best"], **new}
    entries = {name: _fitting(directory / name, known.get(name)) for name in [*sorted(names), BEST]}
    best = entries.pop(BEST)
    index = {
        "checkpoints": {name: entry for name, entry in entries.items() if entry is not None},
        "best": {"file": BEST, **best} if best is not None else None,
    }
    content = (json.dumps(index, indent=1) + "\n").encode()
    with suppress(OSError):
        if read_regular(directory / INDEX) == content:
            return
    write_atomic(directory / INDEX, content)


def entry(path: Path, state: dict[str, Any], sha256: str, time: str) -> dict[str, Any]:
    """What the index says about the file `path`. Size and mtime_ns tell later whether it is still the same file."""
    status = path.stat()
    position = {key: state[key] for key in ("step", "epoch", "step_in_epoch")}
    return {**position, "sha256": sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "time": time}


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in _KINDS.items())


def _fitting(path: Path, known: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entry of a file: the known one if it is of this file, else one made from it; None where it is not good."""
    with suppress(OSError, BadCheckpointError, RunFailedError):
        status = path.stat()
        if known is not None and (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return {key: known[key] for key in _KINDS}
        state = checkpoint.read(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        written = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="milliseconds")
        return entry(path, state, sha256, written.replace("+00:00", "Z"))
    return None


def step_name(step: int) -> str:
    """The file name of the checkpoint after `step` steps."""
    return f"step_{step:08d}.pt"


def candidates(directory: Path) -> list[Path]:
    """Checkpoint files by step, newest first. Only a name that a run writes counts: step_18.pt is none."""
    return [path for step, path in sorted(_numbered(directory), reverse=True) if path.name == step_name(step)]


def misnamed(directory: Path) -> list[Path]:
    """Files such as step_18.pt, which claim a step under a name that no run writes: neither read nor removed."""
    return [path for step, path in sorted(_numbered(directory)) if path.name != step_name(step)]


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(directory)  # noqa: PTH208 - what Path offers hides a folder that may not be read
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFailedError(
            f"{directory}: cannot be read: {error.strerror}. HINT: the run's checkpoints should be there; it does not "
            "start over without a look at them."
        ) from None
    return [(int(m[1]), directory / name) for name in names if (m := re.fullmatch(r"step_([0-9]+)\.pt", name))]


@dataclass(frozen=True)
class Found:
    """A checkpoint that verifies, and the newer files that do not, each with the reason."""

    path: Path
    state: dict[str, Any]
    bad: list[tuple[Path, str]]


def newest_good(directory: Path) -> Found | None:
    """The newest checkpoint that verifies, or None in a new run. Changes nothing.

    best.pt is a whole state, too, and is taken where it is newer than all step files that are good.

    Raises:
        RunFailedError: where there are checkpoints and none is good. Starting over unasked would lose the run.
    """
    found: Found | None = None
    bad: list[tuple[Path, str]] = []
    paths = candidates(directory)
    for path in paths:
        try:
            found = Found(path, _read(path), bad)
            break
        except BadCheckpointError as error:
            if os.path.lexists(path):  # else the run that writes here has removed it meanwhile
                bad.append((path, str(error)))
    best = directory / BEST
    if found is None and not bad and paths and candidates(directory):
        return newest_good(directory)
    if (bad or found is None) and os.path.lexists(best):
        try:
            state = checkpoint.read(best)
            if found is None or state["step"] > found.state["step"]:
                return Found(best, state, bad)
        except (BadCheckpointError, RunFailedError) as error:
            if found is None:
                bad.append((best, str(error)))
    if found is None:
        bad += [(path, "not a name that a run gives its checkpoints") for path in misnamed(directory)]
    if found is None and bad:
        raise RunFailedError(
            "no checkpoint of the run is good; tried, newest first:\n"
            + "\n".join(f"  {path}: {reason}" for path, reason in bad)
            + "\nHINT: restore one from a backup; to start from step 0, move these and the run's logs away."
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    state = checkpoint.read(path)
    if path.name != step_name(state["step"]):
        raise BadCheckpointError(f"holds step {state['step']}, which is not what its name says")
    return state


def duplicate(source: Path, target: Path) -> None:
    """Make the file `target` the same as `source`, in the same folder; by a hard link where there are such.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_name(target)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:  # a file system without hard links
        with replacing(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
    finally:
        temporary.unlink(missing_ok=True)  # still there where both were the same file already, see rename(2)
    sync_directory(target.parent)


@dataclass
class _Snapshot:
    """A state that is to become a file. `reason` says why it could not yet; it is tried again with the next one."""

    name: str
    state: dict[str, Any]
    best: bool
    reason: str | None = None
    entry: dict[str, Any] | None = None  # once it is on disk, while best.pt is not


class CheckpointStore:
    """Writes checkpoints from a thread of its own, one at a time, and never makes training wait. Rank 0 only.

    Two states can wait: the newest, whose place the next one takes, and the one that is to be best.pt, whose place only
    a better one takes. The best one, which is the older of the two, is written first: a kill leaves no checkpoint
    without the best.pt that belongs to it. One that could not be written waits to be tried again with the next. So host
    memory holds three states at most (two that wait, one that is being written though its place is taken), beside the
    one that the caller is about to hand over.

    Args:
        directory: checkpoints/<run>.
        keep: newest files kept, beside best.pt.
        on_written: told (file name, entry of the index) from the writing thread after each durable checkpoint.
        on_failed: told (file name, reason) when one could not be written; training goes on.
        on_note: told, in a line for people, of what else went wrong and was mended or left.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        on_written: Callable[[str, dict[str, Any]], None],
        on_failed: Callable[[str, str], None],
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.directory, self.keep = directory, keep
        self.on_written, self.on_failed, self.on_note = on_written, on_failed, on_note
        self.bytes_written = 0  # grows while a checkpoint is being written
        self._lock = threading.Lock()
        self._best: _Snapshot | None = None
        self._newest: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        remove_leftovers(directory)  # of a writer that was killed
        self._tidy({})

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None

    @property
    def best_error(self) -> str | None:
        """Why best.pt is not what it should be; None if it is, or still may become so."""
        snapshot = self._best
        return snapshot.reason if snapshot is not None else None

    def holds(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is on disk, or waits to be written."""
        name, newest = step_name(step), self._newest
        return (newest is not None and newest.name == name) or (self.directory / name).is_file()

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Begin to write `state`, a tree of tensors in host memory that nobody changes any more. Never waits."""
        snapshot = _Snapshot(step_name(state["step"]), state, best)
        with self._lock:
            if best:
                self._best = snapshot
            self._newest = snapshot
            self._start()

    def wait(self, alive: Callable[[], None] = lambda: None) -> str | None:
        """Wait until nothing is being written, after one more try at what failed; the reason if the newest still does.

        Args:
            alive: called now and then, as long as the writing gets on.
        """
        with self._lock:
            if any(s is not None and s.reason is not None for s in (self._best, self._newest)):
                self._start()
        seen = -1
        while (thread := self._thread) is not None:
            thread.join(1.0)
            if self.bytes_written != seen:
                seen = self.bytes_written
                alive()
        newest = self._newest
        return newest.reason or "it was not tried" if newest is not None and newest.entry is None else None

    def _start(self) -> None:
        for snapshot in (self._best, self._newest):
            if snapshot is not None:
                snapshot.reason = None
        if self._thread is None:
            # Not a daemon: an interpreter that ends on its own waits for the file.
            thread = threading.Thread(target=self._work, name="checkpoint")
            thread.start()
            self._thread = thread

    def _work(self) -> None:
        try:
            while (snapshot := self._next()) is not None:
                reason = self._write(snapshot)
                with self._lock:
                    snapshot.reason = reason
                    if reason is None and self._best is snapshot:
                        self._best = None
                    if reason is None and self._newest is snapshot:
                        self._newest = None
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None  # after an error, which the interpreter prints

    def _next(self) -> _Snapshot | None:
        with self._lock:
            for snapshot in (self._best, self._newest):
                if snapshot is not None and snapshot.reason is None:
                    return snapshot
            self._thread = None
            return None

    def _write(self, snapshot: _Snapshot) -> str | None:
        """Write one; the reason if that failed."""
        reason = None
        fresh = snapshot.entry is None or not (self.directory / snapshot.name).exists()
        if fresh and (reason := self._attempt(snapshot.name, lambda: self._write_file(snapshot))) is not None:
            return reason
        if snapshot.best:
            reason = self._attempt(BEST, lambda: duplicate(self.directory / snapshot.name, self.directory / BEST))
        assert snapshot.entry is not None
        best = {BEST: snapshot.entry} if snapshot.best and reason is None else {}
        self._tidy({snapshot.name: snapshot.entry, **best})
        if fresh:
            self.on_written(snapshot.name, snapshot.entry)
        return reason

    def _attempt(self, name: str, work: Callable[[], None]) -> str | None:
        try:
            try:
                work()
            except FileNotFoundError:  # the folder has just been removed
                work()
        except Exception as error:  # a full disk reaches us as OSError or as torch's RuntimeError
            reason = f"{type(error).__name__}: {error}"
            self.on_failed(name, reason)
            return reason
        return None

    def _write_file(self, snapshot: _Snapshot) -> None:
        if not self.directory.is_dir():
            self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            self.on_note(f"{self.directory} was gone; it is made again. The checkpoints that were in it are lost")
        path = self.directory / snapshot.name
        tensorfile.seal(snapshot.state)
        with replacing(path) as file:
            sha256 = tensorfile.save(snapshot.state, file, self._advanced)
        snapshot.entry = entry(path, snapshot.state, sha256, utc_now())

    def _advanced(self, count: int) -> None:
        self.bytes_written += count

    def _tidy(self, new: dict[str, dict[str, Any]]) -> None:
        """Bring index.json up to date and remove what is older than the newest `keep`. A failure here loses nothing."""
        try:
            paths = candidates(self.directory)
            if paths:
                update_index(self.directory, [path.name for path in paths[: self.keep]], new)
            for path in paths[self.keep :]:
                with suppress(IsADirectoryError):
                    path.unlink(missing_ok=True)
        except (OSError, RunFailedError) as error:
            self.on_note(f"{self.directory}: {INDEX} or old files could not be brought up to date: {error}")
