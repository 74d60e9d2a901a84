"""At most one writer a run: a lock that the kernel drops with the process that holds it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from cifar_hpc.errors import RunBusyError


class RunLock:
    """flock(2) on a file that also says who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, owner: dict[str, Any], patience_seconds: float = 0.0) -> None:
        """Take the lock and write `owner` into it.

        Args:
            patience_seconds: how long to wait for another holder; after a requeue the last attempt may still be dying.

        Raises:
            RunBusyError: names the holder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience_seconds
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise RunBusyError(
                    f"{self.path}: the run is already being trained by {describe(read_owner(self.path))}."
                )
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock right now, or None."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else read_owner(path)
    finally:
        os.close(descriptor)


def read_owner(path: Path) -> dict[str, Any]:
    """What the last holder wrote about itself."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def describe(owner: dict[str, Any]) -> str:
    """`job 17 (pid 4242 on node1)`, as far as it is known."""
    job = f"job {owner['job_id']}" if owner.get("job_id") else "a process outside any job"
    return f"{job} (pid {owner.get('pid', '?')} on {owner.get('host', '?')})"


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    # A look takes the lock shared, so that two who look at once do not take each other for the holder.
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # A file system without locks (some Lustre and NFS mounts): there --dependency=singleton stands alone.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True
