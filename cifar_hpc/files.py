"""Files that are never half-written, and the temporary files that takes; only regular files are opened.

A temporary file is locked (flock(2)) by the process that writes it, for as long as it lives. Whoever can lock one may
therefore remove it: its writer was killed. That holds across hosts and without process ids, which hosts share.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown

# Of new files, before the umask: others may never write, whatever the umask.
FILE_MODE, DIRECTORY_MODE = 0o664, 0o775
# Where a file system has no locks, only a temporary file as old as this counts as abandoned.
ABANDONED_SECONDS = 24 * 3600.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class NotRegularError(OSError):
    """The path is a directory, a FIFO, a device or a socket, where a file should be."""


def expand_path(text: str, key: str) -> str:
    """A path with ~ and $VARIABLE replaced as a shell does it.

    Raises:
        SpecError: names `key`, and the variable that is not set or the user that there is not.
    """
    for name in re.findall(r"\$\{?([A-Za-z_]\w*)", text, re.ASCII):
        if not os.environ.get(name):
            raise SpecError(f"{key}: {shown(text)} needs the variable {name}, which is not set here. HINT: export it.")
    return os.path.expandvars(expand_home(text, key))


def expand_home(text: str, key: str) -> str:
    """A path with ~ replaced as a shell does it.

    Raises:
        SpecError: names `key` and the user that there is not.
    """
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise SpecError(f"{key}: {shown(text)} names no user. HINT: of a folder with such a name, ./ first.") from None


def make_again(root: Path, folder: Path) -> None:
    """Make a folder of a run again, if it is gone; never its root, which may have been renamed.

    Raises:
        OSError: it cannot be made.
    """
    root.stat()
    folder.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """os.open for regular files only: it neither hangs on a FIFO, nor writes through a symbolic link.

    Raises:
        NotRegularError: says what it is.
        OSError: as os.open.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if writes else 0)
    try:
        descriptor = os.open(path, flags, FILE_MODE)
    except OSError as error:
        if error.errno == errno.ELOOP and writes:
            raise OSError(errno.ELOOP, "is a symbolic link, through which nothing is written", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotRegularError(errno.EINVAL, f"is no regular file but {kind_of(mode)}", str(path))
    return descriptor


def kind_of(mode: int) -> str:
    """Name the kind of a file from its st_mode."""
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends without an error.

    A reader, or a crash, sees the old file or the new one and nothing between.

    Args:
        durable: whether it must survive a crash of the machine.
    """
    temporary, descriptor = _new_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            temporary.replace(path)  # while it is still locked, so that no process takes it for abandoned
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Make a unique name beside `path`, on any host."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def _new_temporary(path: Path) -> tuple[Path, int]:
    while True:
        temporary = temporary_name(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process tidied up before the lock


def remove_leftovers(directory: Path) -> list[str]:
    """Remove the temporary files in `directory` that no living process writes; returns their names."""
    removed = []
    for path in sorted(directory.glob(".*.tmp")):
        with suppress(OSError):  # another process may be tidying up as well
            if path.is_symlink():
                path.unlink()  # not one of ours, which are never links
                removed.append(path.name)
                continue
            with os.fdopen(open_regular(path, os.O_RDWR), "rb") as file:
                locked = try_flock(file.fileno())
                old = time.time() - os.fstat(file.fileno()).st_mtime >= ABANDONED_SECONDS
                if locked or (locked is None and old):
                    path.unlink()  # while it is locked, so that a writer that comes now finds out
                    removed.append(path.name)
    return removed


def write_atomic(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content`; a reader, or a crash, sees the old file or the new one and nothing between."""
    with replacing(path, durable) as file:
        file.write(content)


def sync_directory(directory: Path) -> None:
    """Make renames within `directory` durable (fsync(2): a file's own fsync does not cover its name)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def try_flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Take a lock; false if another process has it, None on a file system without locks.

    Without locks (some Lustre and NFS mounts) --dependency=singleton alone keeps a run to one writer.

    Args:
        kind: LOCK_SH for a look, so that two processes that look at once do not take each other for the holder.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
