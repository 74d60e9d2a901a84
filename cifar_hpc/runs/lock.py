"""Lock for at most one writer a run; the kernel drops it with the process that holds it, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from cifar_hpc.errors import RunBusyError, RunFailedError, SpecError, UserError
from cifar_hpc.files import NotRegularError, open_regular, try_flock
from cifar_hpc.runs.events import Cancelled, Submitted
from cifar_hpc.runs.history import History, time_of
from cifar_hpc.runs.paths import RunPaths, same_folder

OWNER_BYTES = 10_000


class RunLock:
    """flock(2) on a file that names its holder. A process that inherits `descriptor` holds the lock as well."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path, self.descriptor = path, descriptor
        self.owner: dict[str, Any] = {}

    def acquire(self, owner: dict[str, Any], patience_seconds: float = 0.0) -> None:
        """Take the lock and write `owner` into it.

        Args:
            patience_seconds: how long to wait for another holder; after a requeue the last attempt may still be dying.

        Raises:
            RunBusyError: names the holder.
            SpecError: if the path is not a regular file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience_seconds
        while True:
            descriptor = _open(self.path, os.O_RDWR | os.O_CREAT)
            free = try_flock(descriptor) is not False
            if free and self._is_at_path(descriptor):
                break
            os.close(descriptor)
            if not free and time.monotonic() >= deadline:
                raise RunBusyError(
                    f"{self.path}: the run is already being trained by {describe(read_owner(self.path))}."
                )
            time.sleep(0.0 if free else 0.2)
        self.descriptor = descriptor
        self.sign(owner)

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        except FileNotFoundError:
            return False

    def renew(self) -> bool:
        """Take the lock again if its file was deleted or replaced, so that other processes find it; true if so.

        Raises:
            RunFailedError: the file was moved, with its folder or the whole root; says where it is now.
            RunBusyError: another process has been faster; names it.
            SpecError: as `acquire`.
        """
        before = self.descriptor
        with contextlib.suppress(OSError):  # of a file system that is in trouble: later
            if before is not None and not self._is_at_path(before):
                if os.fstat(before).st_nlink:  # it exists under another name
                    now = Path(f"/proc/self/fd/{before}").readlink().parent
                    raise RunFailedError(
                        f"{self.path.parent} was moved or renamed under this process, to {now}; the process ends, "
                        "since it would write the run's files to two places. HINT: submit the run again from its new "
                        "place; it goes on from the newest checkpoint there."
                    )
                self.acquire(self.owner)
                os.close(before)
                return True
        return False

    def sign(self, owner: dict[str, Any]) -> None:
        """Write who holds the lock."""
        assert self.descriptor is not None
        self.owner = owner
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its owner's name
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Close the file, and so release the lock unless another process inherited it; the file stays."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class OwnerLock(RunLock):
    """Lock of a folder of checkpoints, which names the run that it belongs to, also while that has no process.

    Two runs may have one folder: through a link, or as runs of one name in two projects that share checkpoints/.
    """

    def __init__(self, paths: RunPaths) -> None:
        super().__init__(paths.owner)
        self.paths = paths

    def sign(self, owner: dict[str, Any]) -> None:
        """Write who holds the lock, and for which run.

        Raises:
            SpecError: the folder belongs to another run; the lock is released.
        """
        ours, before = self.paths, read_owner(self.path)
        with contextlib.suppress(TypeError, KeyError, ValueError):  # an owner that is no run
            other = RunPaths(Path(before["root"]), before["run"])
            # Of a project that was moved, copied or deleted, or of a first submission that was refused, nothing counts.
            try:
                elsewhere = other.spec.is_file() and same_folder(other.logs, ours.logs) is False
                taken = elsewhere and same_folder(other.checkpoints, ours.checkpoints)
            except PermissionError:  # another user's project, into which this one cannot look
                taken = True
            if taken:
                self.release()
                raise SpecError(
                    f"{ours.checkpoints}: holds the checkpoints of run {other.name} in {other.root}, and one folder "
                    f"belongs to one run. HINT: use another --name; if that run is not needed any more, "
                    f"delete {self.path}."
                )
        super().sign(owner | {"root": str(ours.root), "run": ours.name})


def claim(paths: RunPaths) -> None:
    """Record that the folder of checkpoints belongs to this run, before it has a process.

    Raises:
        SpecError: it belongs to another run.
        RunBusyError: a process writes there.
    """
    lock = OwnerLock(paths)
    lock.acquire({})
    lock.release()


class WriterLock:
    """The locks of the process that writes a run's files: that of its folder of checkpoints, and run.lock."""

    def __init__(self, paths: RunPaths) -> None:
        self.locks = (OwnerLock(paths), RunLock(paths.lock))

    @property
    def held(self) -> bool:
        """True after `acquire`."""
        return self.locks[1].descriptor is not None

    def acquire(self, owner: dict[str, Any], patience_seconds: float = 0.0) -> None:
        """Take both locks, as `RunLock.acquire`; the folder must not belong to another run."""
        try:
            for lock in self.locks:
                lock.acquire(owner, patience_seconds)
        except UserError:
            self.release()
            raise

    def renew(self) -> list[Path]:
        """Take a lock again whose file was deleted or replaced; returns the paths of those.

        Raises:
            RunFailedError: another process has been faster, or the files were moved.
        """
        try:
            return [lock.path for lock in self.locks if lock.renew()]
        except (RunBusyError, SpecError) as error:
            raise RunFailedError(f"{error} The lock of this process was deleted or replaced, so it ends.") from None

    def release(self) -> None:
        """Release both locks."""
        for lock in self.locks:
            lock.release()


def lock_submission(folder: Path, what: str) -> RunLock:
    """Take the lock of those who submit or freeze `what`; the kernel drops it when its last holder ends.

    Args:
        folder: logs of a run, or of a sweep's submissions.

    Raises:
        RunBusyError: if another process has it.
    """
    lock = RunLock(folder / "submit.lock")
    try:
        lock.acquire({"pid": os.getpid(), "host": socket.gethostname()})
    except RunBusyError:
        owner = read_owner(lock.path)
        if owner.get("controller"):
            raise RunBusyError(
                f"{what} is being run by process {owner.get('pid', '?')} on {owner.get('host', '?')}. "
                "HINT: wait for it, or cancel its runs."
            ) from None
        raise RunBusyError(f"{what} is being submitted by another process right now.") from None
    return lock


def holder(path: Path) -> dict[str, Any] | None:
    """Owner of a lock that is held now, or None.

    Raises:
        SpecError: if the path is not a regular file.
    """
    try:
        descriptor = _open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return read_owner(path) if try_flock(descriptor, fcntl.LOCK_SH) is False else None
    finally:
        os.close(descriptor)


def read_owner(path: Path) -> dict[str, Any]:
    """Owner that the last holder wrote into the lock."""
    try:
        with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
            owner = json.loads(file.read(OWNER_BYTES))
    except (OSError, SpecError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def holder_pid(path: Path) -> int | None:
    """Process on this machine that holds the lock, if it is one of this user's.

    The number in the file is checked with the kernel, since a signal will go there: the process must have this file
    open.
    """
    owner = holder(path) or {}
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid <= 1:
        return None
    with contextlib.suppress(OSError):
        if any(link.samefile(path) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists()):
            return pid
    return None


def describe(owner: dict[str, Any]) -> str:
    """`job 17 (pid 4242 on node1)`, as far as known."""
    job = f"job {owner['job_id']}" if owner.get("job_id") else "a process outside any job"
    return f"{job} (pid {owner.get('pid', '?')} on {owner.get('host', '?')})"


def _open(path: Path, flags: int) -> int:
    """Open a lock's file; others may have put something else in its place.

    Raises:
        SpecError: if `path` is no regular file; nothing has been changed then.
        OSError: for any other reason.
    """
    try:
        return open_regular(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket.
        if not isinstance(error, NotRegularError) and error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise SpecError(
            f"{path}: {error.strerror}; a lock is a regular file. HINT: find out who put it there, and remove it."
        ) from None


def controller_of(paths: RunPaths, history: History) -> int | None:
    """Process id of submitit's local controller, if that of the run's last submission is alive on this machine."""
    submitted = history.last_of(Submitted)
    if submitted.get("scheduler") != "local":
        return None
    try:
        pid = int(submitted["job_id"])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (KeyError, TypeError, ValueError, OSError):  # a damaged line of events.jsonl, a process that has ended
        return None
    return pid if "submitit.local._local" in arguments and str(paths.slurm) in arguments else None


def waits_here(paths: RunPaths, history: History) -> bool:
    """True if the run waits for its turn in a sweep on this machine, and was not cancelled since."""
    lock = paths.logs / "submit.lock"
    waits = bool((holder(lock) or {}).get("controller"))
    return waits and (time_of(history.last_of(Cancelled)) or 0.0) < lock.stat().st_mtime


def signal_local(paths: RunPaths, number: signal.Signals) -> bool:
    """Signal the run's processes on this machine; false if there are none."""
    # The controller passes SIGTERM on to every task.
    pid = controller_of(paths, History.read(paths.events)) if number is signal.SIGTERM else None
    pid = pid or holder_pid(paths.lock)  # one rank is enough: all agree on where to stop
    if pid is not None:
        os.kill(pid, number)
    return pid is not None
