"""A run's three logs: train.log for people, metrics.jsonl (one row an epoch) and events.jsonl for both."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc.jsonfile import write_atomic


def utc_now() -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def append_line(path: Path, line: str) -> None:
    """Append whole lines with one write(2), so that lines of several processes never mix.

    A line that was cut short (a full disk) is ended first, so that it cannot swallow this one. A log that cannot be
    written is no reason to end a run: the line then goes to standard error. The rows of metrics.jsonl are in every
    checkpoint too, and `restore_metrics` puts them back.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, ("\n" * cut + line + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"{path}: {error.strerror}; the line was: {line}", file=sys.stderr, flush=True)


class TrainLog:
    """Plain lines with a local time, each on disk as soon as it is written; silent on every rank but 0."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.enabled = path, enabled

    def line(self, text: str) -> None:
        """Write one line."""
        if self.enabled:
            append_line(self.path, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}")

    def banner(self, lines: Sequence[str]) -> None:
        """A block that is easy to find by eye: one at each start."""
        if self.enabled:
            rule = "=" * 100
            append_line(self.path, "\n".join([rule, *(f"== {line}" for line in lines), rule]))


def append_event(
    path: Path, event: str, *, job_id: str | None, restart: int | None, world_size: int | None, **details: Any
) -> None:
    """Append one object to events.jsonl."""
    row = {
        "time": utc_now(),
        "event": event,
        "host": socket.gethostname(),
        "job_id": job_id,
        "restart": restart,
        "world_size": world_size,
        **details,
    }
    append_line(path, json.dumps(row))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a missing file is empty, and a line cut short by a crash is left out."""
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def since_submission(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events since the run was last submitted: limits of retries begin anew with each submission."""
    last = max((i for i, row in enumerate(events) if row.get("event") == "submitted"), default=0)
    return list(events[last:])


def count_requeues(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often the run was requeued, by cause: preemption, timeout, failure, ..."""
    counts: dict[str, int] = {}
    for row in events:
        if row.get("event") == "requeued":
            reason = str(row.get("reason"))
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def count_starts(events: Sequence[Mapping[str, Any]]) -> int:
    """How often the run has been started so far."""
    return sum(row.get("event") in ("started", "resumed") for row in events)


def metrics_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """metrics.jsonl for `rows`."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def restore_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Make metrics.jsonl hold exactly `rows`, those of the checkpoint; returns how many lines were cut off.

    What a killed run wrote beyond its last checkpoint is cut off in place, so that a `tail -F` goes on; a file that
    was lost or damaged is written anew.
    """
    wanted = metrics_text(rows).encode()
    present = path.read_bytes() if path.exists() else b""
    if present == wanted:
        return 0
    if present.startswith(wanted):
        with path.open("r+b") as file:
            file.truncate(len(wanted))
            os.fsync(file.fileno())
        return present[len(wanted) :].count(b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, wanted)
    return 0
