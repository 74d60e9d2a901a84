"""Writing and reading of a run's logs: train.log for people, metrics.jsonl and events.jsonl for people and programs.

A log that cannot be written ends no run. Lines that could not be written are kept and written later; rows missing in
metrics.jsonl are taken from the training state, which has all of them.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc.files import NotRegularError, make_again, open_regular, read_regular, write_atomic
from cifar_hpc.text import printable

# Lines of one log that are kept for later; beyond it the oldest are only on standard error.
KEPT_LINES = 1000
SAID_AFTER_SECONDS = 2.0
# The batch script writes such a line to the job's output as it begins: what follows is of that start.
START_MARK = "== start of job "
NEWLINE = "\n"
OUTPUT_BYTES = 20_000  # at the end of an output file
# Called with the lines of a log as they are written.
listeners: dict[Path, Callable[[str], object]] = {}
_kept: defaultdict[Path, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))
_lock = threading.Lock()  # checkpoints are reported from a thread of their own


def utc_now() -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def append_line(path: Path, line: str) -> None:
    """Append whole lines, in printable characters, with one write(2), so that those of several processes never mix.

    A line that was cut short (a full disk) is ended first, so that it cannot swallow this one. Where the log cannot be
    written, the line goes to standard error, and is kept for the next call.
    """
    with _lock:
        _kept[path].append(line := printable(line))
        if (trouble := _write_kept(path)) is not None:
            complain(f"{path}: {trouble.strerror}; the line was: {line}")
        if path in listeners:
            listeners[path](line)


def _write_kept(path: Path) -> OSError | None:
    waiting = _kept[path]
    try:
        while waiting:
            _append(path, waiting[0] + "\n")
            waiting.popleft()
    except OSError as error:
        return error
    return None


def write_rest(patience_seconds: float, pause_seconds: float) -> None:
    """Write the lines that are kept, before this process ends; try again for so long."""
    end = time.monotonic() + patience_seconds
    while True:
        with _lock:
            rest = [path for path in _kept if _write_kept(path) is not None]
        if not rest or time.monotonic() > end:
            return
        time.sleep(pause_seconds)


def complain(text: str) -> None:
    """Write a line to standard error, if that is possible."""
    with suppress(OSError):  # under Slurm standard error is a file, on the same full disk perhaps
        print(text, file=sys.stderr, flush=True)


def _append(path: Path, text: str) -> None:
    make_again(path.parents[2], path.parent)  # <root>/logs/<run>
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        write_all(descriptor, ("\n" * cut + text).encode())
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content`, or raise the error that prevents it."""
    while content:  # a disk that is nearly full takes a part, and says why with the next write
        content = content[os.write(descriptor, content) :]


class TrainLog:
    """Plain lines with a local time, each written at once; disabled on every rank but 0."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self._begun = False

    def line(self, text: str) -> None:
        """Write one line."""
        if self.enabled:
            if self._begun and not self.path.exists():
                append_line(self.path, f"WARNING {self.path} was gone; it is made again, and what was in it is lost")
            self._begun = True
            append_line(self.path, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}")

    def warn(self, text: str) -> None:
        """Write one line that begins with WARNING."""
        self.line(f"WARNING {text}")

    def banner(self, lines: Sequence[str]) -> None:
        """Write a block that is easy to find by eye: one for each attempt."""
        if self.enabled:
            self._begun = True
            append_line(self.path, "\n".join(["=" * 80, *(f"== {line}" for line in lines)]))


def soon(say: Callable[[str], object], text: str) -> threading.Timer:
    """Say in a moment what begins now, unless that is cancelled: work that is over by then is not mentioned."""
    timer = threading.Timer(SAID_AFTER_SECONDS, say, [text])
    timer.daemon = True
    timer.start()
    return timer


def output_of_start(path: Path) -> list[str]:
    """The last lines that the newest start of a job wrote to an output file; none if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-min(OUTPUT_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        _, mark, text = printable(file.read().decode(errors="replace")).rpartition(START_MARK)
        return [line for line in text.splitlines()[bool(mark) :] if line.strip()]
    return []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a missing file is empty.

    Left out is what is no row: a line cut short by a crash, or the NUL bytes that a crashed machine leaves where a
    file had grown and its content was not on disk yet (ext4 and XFS allocate late).
    """
    try:
        content = read_regular(path)
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return []
    return parse_jsonl(content)


def parse_jsonl(content: bytes) -> list[dict[str, Any]]:
    """The rows in `content`, as `read_jsonl`."""
    rows: list[dict[str, Any]] = []
    with suppress(ValueError, RecursionError):  # all at once takes half the time, where all are whole
        rows = json.loads(f"[{content.decode().removesuffix(NEWLINE).replace(NEWLINE, ',')}]")
        if len(rows) == content.count(b"\n") and all(isinstance(row, dict) for row in rows):
            return rows
    rows = []
    for line in content.split(b"\n"):
        try:
            row = json.loads(line.decode(errors="replace").strip("\0 \r"))
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def metrics_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """metrics.jsonl for `rows`."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def restore_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Make metrics.jsonl hold exactly `rows`, those of the training state; returns the number of rows removed.

    Rows that a killed attempt wrote after its last checkpoint are cut off in place, and missing rows are appended, so
    that a `tail -F` continues; a lost or damaged file is replaced. A failure is reported on standard error; the next
    call repairs it.
    """
    try:
        return write_metrics(path, rows)
    except OSError as error:
        complain(f"{path}: {error.strerror}; its rows are in the checkpoints too")
        return 0


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """`restore_metrics`, where a failure matters.

    Raises:
        OSError: the file cannot be written.
    """
    wanted = metrics_text(rows).encode()
    make_again(path.parents[2], path.parent)  # <root>/logs/<run>
    try:
        present = read_regular(path)
    except FileNotFoundError:
        present = b""
    if present == wanted:
        return 0
    if wanted.startswith(present) or present.startswith(wanted):
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            if len(present) > len(wanted):
                os.ftruncate(descriptor, len(wanted))
                os.fsync(descriptor)
            write_all(descriptor, wanted[len(present) :])
        finally:
            os.close(descriptor)
    else:
        write_atomic(path, wanted)
    beyond = {row["epoch"] for row in parse_jsonl(present) if isinstance(row.get("epoch"), int)}
    return len(beyond - {row["epoch"] for row in rows})
