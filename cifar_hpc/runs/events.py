"""Rows of events.jsonl."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.runs.logs import append_line, utc_now


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
