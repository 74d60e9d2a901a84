"""Whether a folder's file system does what a run rests on: fsync, rename, locks, room, and being shared."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.cli.doctor.doctor_report import Finding
from cifar_hpc.files import read_regular, try_lock, write_atomic

# Lie on one machine's own disk or memory; a login node may of course export them to the others.
LOCAL_TYPES = {"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "squashfs"}
LOCAL_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/local"), Path("/localscratch"))
# Mount options under which a lock is not seen on other nodes: mount.lustre(8), nfs(5).
PRIVATE_LOCKS = {"localflock", "nolock", "local_lock=all", "local_lock=flock"}
NO_LOCKS = {"noflock"}
# The full model's weights, slow weights and momentum are 59 MB a checkpoint, of which a run keeps five or so.
WARNING_BYTES, PROBLEM_BYTES = 5e9, 5e8

# Files in the folder of doctor's job: what to look at, and a lock that the login node holds meanwhile.
PLAN, LOCK = "plan.json", "lock"


def task_file(folder: Path, rank: int) -> Path:
    """Where a task of doctor's job writes its report."""
    return folder / f"task-{rank}.json"


@dataclass(frozen=True)
class Mount:
    """What a path lies on."""

    point: str
    kind: str
    options: frozenset[str]


def mount_of(path: Path, mountinfo: str) -> Mount:
    """The mount that holds `path`, which must be absolute and resolved.

    Args:
        mountinfo: the text of /proc/self/mountinfo (proc(5)).
    """
    found = Mount("/", "unknown", frozenset())
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if not separator or len(fields) < 6 or len(more) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), fields[4])
        if path.is_relative_to(point) and len(point) >= len(found.point):  # of two on one point the later one is seen
            found = Mount(point, more[0], frozenset({*fields[5].split(","), *more[2].split(",")}))
    return found


def check_folder(folder: Path, *, alone: bool) -> list[Finding]:
    """Look at the folder that holds checkpoints/ and logs/.

    Args:
        alone: there is no Slurm, so nobody has to share it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch(folder) as scratch:
            seen = scratch / "a"
            write_atomic(seen, b"before")
            write_atomic(seen, b"after")
            if read_regular(seen) != b"after":
                raise OSError("a file that was replaced still shows what it held before")
    except OSError as error:
        return [
            Finding(
                "file system",
                "problem",
                f"{folder}: writing, fsync or rename failed: {error.strerror or error}",
                "set CIFAR_HPC_ROOT to a folder that you can write and that the compute nodes share",
            )
        ]
    mount = mount_of(folder, _mountinfo())
    return [_writable(folder, mount, alone), _locks(folder, mount), _room(folder)]


def _writable(folder: Path, mount: Mount, alone: bool) -> Finding:
    words = f"{folder} ({mount.kind} on {mount.point}): writing, fsync and rename work"
    local = mount.kind in LOCAL_TYPES or any(folder.is_relative_to(p) for p in LOCAL_FOLDERS)
    if not local or alone:
        return Finding("file system", "ok", words)
    return Finding(
        "file system",
        "warning",
        f"{words}, but this may be this machine's own disk",
        "compute nodes must see the same folder; --job finds out. Else clone the project elsewhere, or set "
        "CIFAR_HPC_ROOT",
    )


def _locks(folder: Path, mount: Mount) -> Finding:
    advice = (
        "Slurm alone then keeps a run to one writer (--dependency=singleton): do not start the same run by hand or "
        "with --cluster local as well"
    )
    if private := mount.options & (PRIVATE_LOCKS | NO_LOCKS):
        return Finding(
            "locks", "warning", f"mounted with {', '.join(sorted(private))}: other nodes see no locks", advice
        )
    try:
        with _scratch(folder) as scratch, hold_lock(scratch / "lock"):
            if not is_locked(scratch / "lock"):
                return Finding("locks", "warning", "a lock (flock) that is held does not keep others out", advice)
    except OSError as error:
        return Finding("locks", "warning", f"flock does not work here: {error.strerror}", advice)
    return Finding("locks", "ok", "flock works")


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    words = f"{free / 1e9:,.1f} GB free (a quota of yours is not seen here)"
    advice = "a run of the full model keeps about 0.3 GB of checkpoints; make room, or set CIFAR_HPC_ROOT"
    if free < PROBLEM_BYTES:
        return Finding("free space", "problem", words, advice)
    return (
        Finding("free space", "warning", words, advice) if free < WARNING_BYTES else Finding("free space", "ok", words)
    )


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock(2) on a new file, where its file system has locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o664)
    try:
        try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody else holds a lock on a file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / f".doctor-{secrets.token_hex(4)}"
    path.mkdir(0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:  # not Linux
        return ""
