"""Code snapshot of a submission: later changes of the project never reach a queued job."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from cifar_hpc.files import sync_directory, temporary_name
from cifar_hpc.runs.paths import PACKAGE, RunPaths, SweepPaths, package_files

# A snapshot is never edited; its folders stay writable to their owner, so that it can be removed.
FILE_MODE, DIRECTORY_MODE = 0o444, 0o755


def take_snapshot(paths: RunPaths | SweepPaths) -> Path:
    """Copy the package to logs/<run>/code/<digest>/cifar_hpc; returns the folder above it, in which jobs run.

    All points of a sweep run from one copy, that of the sweep's submission. An existing snapshot is used again only if
    it equals the package to the byte. The caller holds the lock of submissions, and no job of the run exists.
    """
    # Read once: the digest is that of the copied content, even if the project is edited meanwhile.
    files = {f"{PACKAGE.name}/{file.relative_to(PACKAGE).as_posix()}": file.read_bytes() for file in package_files()}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = paths.code / digest.hexdigest()[:12]
    paths.code.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    _remove_leftovers(paths.code)
    if _is(target, files):
        return target
    temporary = temporary_name(target)
    _write(temporary, files)
    if os.path.lexists(target):
        target.rename(temporary_name(target))  # incomplete or modified: never executed
    temporary.rename(target)
    sync_directory(paths.code)
    _remove_leftovers(paths.code)
    return target


def _is(target: Path, files: dict[str, bytes]) -> bool:
    """Check that `target` holds exactly `files`, and that only its owner and group may write there."""
    for cache in list(target.rglob("__pycache__")):
        _remove(cache)  # of earlier jobs; compiled code is not compared, so not trusted
    if not os.path.lexists(target):
        return False
    modes = {path: path.lstat().st_mode for path in [target, *target.rglob("*")]}
    if any(not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or mode & stat.S_IWOTH for mode in modes.values()):
        return False
    found = [path for path, mode in modes.items() if stat.S_ISREG(mode)]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in found} == files


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for subfolder in sorted({folder} | {(folder / name).parent for name in files}):
        subfolder.mkdir(DIRECTORY_MODE)
    for name, content in files.items():
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
            file.write(content)


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of a killed submission or of a replaced snapshot."""
    for path in folder.glob(".*.tmp"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
