"""The facts of runs whose logs have not changed since they were last read, kept in logs/.status-cache.

An entry holds for one state of both files: inode, size, time of the last change of content, and of anything at all,
which nobody can set. The files are opened for that, since only an open asks an NFS server how they are now. Whoever
cannot read or write the cache reads the logs instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from cifar_hpc.files import open_regular, remove_leftovers, write_atomic
from cifar_hpc.runs import history as restarts
from cifar_hpc.runs import history as run_facts
from cifar_hpc.runs import logs as runlog
from cifar_hpc.runs.history import Facts, read_facts
from cifar_hpc.runs.paths import RunPaths

# Times in file systems are as coarse as this: of a file changed within it, a later change might not show.
SETTLED_SECONDS = 5
# A cache that lacks fewer runs than this is not written anew: reading them takes less time.
WORTH_WRITING = 50
MAX_BYTES = 64 * 1024 * 1024
DIGEST_BYTES = 64

_Mark = list[int] | None


class FactsCache:
    """The facts of the runs of one project."""

    def __init__(self, root: Path) -> None:
        self._path = root / "logs" / ".status-cache"
        self._entries = _load(self._path)
        self._asked: set[str] = set()
        self._new = 0

    def facts(self, paths: RunPaths) -> Facts:
        """As `read_facts`, from memory where nothing has changed.

        Raises:
            OSError, TypeError: as `read_facts`.
        """
        try:
            marks = [_mark(paths.events), _mark(paths.metrics)]
        except OSError:
            return read_facts(paths)
        self._asked.add(paths.name)
        known = self._entries.get(paths.name)
        if known is not None and known["marks"] == marks:
            return Facts(**known["facts"])
        facts = read_facts(paths)
        self._entries.pop(paths.name, None)
        if all(map(_settled, marks)) and marks == [_mark(paths.events), _mark(paths.metrics)]:
            self._entries[paths.name] = {"marks": marks, "facts": dict(vars(facts))}
            self._new += 1
        return facts

    def save(self) -> None:
        """Write what has been asked for, if that is worth it; where it cannot be written nothing is lost."""
        if self._new < WORTH_WRITING:
            return
        entries = {name: entry for name, entry in self._entries.items() if name in self._asked}
        with contextlib.suppress(OSError, RecursionError):
            content = json.dumps(entries).encode()
            if len(content) < MAX_BYTES:
                remove_leftovers(self._path.parent)
                write_atomic(self._path, _digest(content) + content)
        self._new = 0


def _mark(path: Path) -> _Mark:
    """What tells one state of a file from another; None where there is no file.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _settled(mark: _Mark) -> bool:
    return mark is None or max(mark[2:]) < time.time_ns() - SETTLED_SECONDS * 10**9


def _load(path: Path) -> dict[str, Any]:
    """The entries; none where there is no cache, or it is damaged or of another version of this code."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError:
        return {}
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    entries: dict[str, Any] = {}
    if digest == _digest(content):
        with contextlib.suppress(RecursionError):
            entries = json.loads(content)
    return entries


def _digest(content: bytes) -> bytes:
    """Of the content, and of the code that makes it."""
    sums = hashlib.sha256()
    for module in (runlog, restarts, run_facts):
        sums.update(Path(str(module.__file__)).read_bytes())
    sums.update(content)
    return sums.hexdigest().encode()
