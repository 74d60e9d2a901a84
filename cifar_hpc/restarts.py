"""What restarts cost a run so far, from its events: how often it came back, why, and how much time that took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

STARTS = ("started", "resumed")
ENDS = ("requeued", "left", "failed", "hang", "holding", "finished", "submitted")
AGAIN = "submitted"  # the cause of a start that a person asked for by submitting again
UNANNOUNCED = "killed"  # the cause of one before which nobody had a chance to say anything


@dataclass(frozen=True)
class Restarts:
    """The starts of a run after its first.

    causes: how many of them came after a preemption, timeout, failure, submitted (again, by a person), or killed.
    lost_seconds: what they cost, see `restarts_of`.
    up_seconds: between each start and its end, as far as events tell.
    """

    causes: dict[str, int] = field(default_factory=dict)
    lost_seconds: float = 0.0
    up_seconds: float = 0.0


def restarts_of(events: Sequence[Mapping[str, Any]]) -> Restarts:
    """Read a run's events in their order.

    A start lasts from its event `started` or `resumed`, when it was ready to train, to the last event before the next
    start that says how it ended or what it had saved. A stop with a warning ends with its own event; a start that was
    killed ends with its last checkpoint, so that the work that was computed again counts as lost. From there to the
    next start the time is lost: waiting in the queue, starting up, computing again. What passes before a person submits
    again is nobody's loss and is left out.

    Args:
        events: of which checkpoints may be left out, but for the last one between a start and the first of ENDS.
    """
    causes: dict[str, int] = {}
    lost = up = 0.0
    start: datetime | None = None
    end: datetime | None = None
    begun, ended, cause = False, False, UNANNOUNCED
    for event in events:
        name = event.get("event")
        if name in STARTS:
            when = instant_of(event)
            if begun:
                causes[cause] = causes.get(cause, 0) + 1
                up += _seconds(start, end)
                lost += _seconds(end, when) if cause != AGAIN else 0.0
            start, end, begun, ended, cause = when, when, True, False, UNANNOUNCED
        elif begun and name in ENDS:
            cause, ended = _cause(event, cause), True
            if cause != AGAIN:
                end = instant_of(event)
        elif name == "checkpoint" and not ended:
            end = instant_of(event)
    return Restarts(causes, lost, up + _seconds(start, end))


def _cause(event: Mapping[str, Any], before: str) -> str:
    """Why the next start comes, after one more event; the latest word counts, and a submission above all."""
    name = event.get("event")
    if name == AGAIN or before == AGAIN:
        return AGAIN
    if name == "requeued" or (name == "left" and event.get("reason") == "preemption"):
        return str(event.get("reason"))
    if name in ("failed", "hang"):
        return "failure"
    if name == "holding" and before == UNANNOUNCED:
        return "preemption"  # it was warned, and could not ask Slurm why
    return before


def instant_of(event: Mapping[str, Any]) -> datetime | None:
    """When an event was written; None where it does not say so."""
    try:
        instant = datetime.fromisoformat(event["time"])
        return instant if instant.tzinfo is not None else None
    except (KeyError, TypeError, ValueError):
        return None


def _seconds(begin: datetime | None, end: datetime | None) -> float:
    return max(0.0, (end - begin).total_seconds()) if begin is not None and end is not None else 0.0
