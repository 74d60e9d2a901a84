"""The history of a run, from its events.jsonl and metrics.jsonl: attempts, restarts and their cost, epochs.

A run of 400 epochs has a thousand rows, and there may be thousands of runs. Rows are left out by their beginning, in
the spelling of `append_event`; every other or damaged row is read in full."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from cifar_hpc.files import NotRegularError, read_regular
from cifar_hpc.runs.events import count_requeues, count_starts
from cifar_hpc.runs.logs import parse_jsonl, parse_row
from cifar_hpc.runs.paths import RunPaths

# By these a start says how it ends, or at least that somebody asked it to.
LAST_EVENTS = ("finished", "failed", "hang", "requeued", "signal", "holding", "left")


@dataclass(frozen=True)
class Losses:
    """How often work was lost so far, and in how many seconds of running."""

    count: int = 0
    seconds: float = 0.0


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


RECENT_EPOCHS = 5  # from which the time to the end is estimated
# The last of these is how things stood when the run was last heard of.
TELLING = (
    *("submitted", "started", "resumed", "checkpoint", "requeued", "holding"),
    *("finished", "failed", "hang", "left", "cancelled"),
)
_USED_OF_LAST_WORD = ("event", "time", "test_accuracy", "error", "cause", "by", "reason", "explanation")
_ROUTINE = re.compile(rb'\{"time": "[^"\\]*", "event": "(checkpoint|evaluated|signal)", ')
_ACCURACY = re.compile(rb'"test_accuracy": ([0-9]+\.[0-9]+), "lr": ')
_ACCURACY_IS = b'"test_accuracy": %b, "lr": '


@dataclass(frozen=True)
class Facts:
    """The two logs in sum. Values are as they stand in the files, of whatever type.

    last_word: the event that says how things stand once the job is gone; empty if there has been none.
    submitted: scheduler and job_id of the last submission; empty if there has been none.
    causes, lost_seconds, up_seconds: as `Restarts`.
    epoch_seconds: of those of the last RECENT_EPOCHS rows that were trained by as many ranks as the last one.
    """

    last_word: dict[str, Any]
    submitted: dict[str, Any]
    starts: int
    requeues: dict[str, int]
    causes: dict[str, int]
    lost_seconds: float
    up_seconds: float
    world_size: Any
    job_id: Any
    last_row: dict[str, Any]
    epoch_seconds: list[Any]
    best_accuracy: Any


def read_facts(paths: RunPaths) -> Facts:
    """The facts of one run; a log that is missing or no regular file is empty.

    Raises:
        OSError: a log cannot be read.
        TypeError: values of types that make no sense together.
    """
    events = _telling_rows(_read(paths.events))
    content = _read(paths.metrics)
    recent = _last_rows(content, RECENT_EPOCHS)
    starts = [e for e in events if e.get("event") in STARTS]
    restarts = restarts_of(events)
    submissions = [e for e in events if e.get("event") == "submitted"]
    return Facts(
        last_word=_part(_last_word(events), _USED_OF_LAST_WORD),
        submitted=_part(submissions[-1], ("scheduler", "job_id")) if submissions else {},
        starts=count_starts(events),
        requeues=count_requeues(events),
        causes=restarts.causes,
        lost_seconds=restarts.lost_seconds,
        up_seconds=restarts.up_seconds,
        world_size=starts[-1].get("world_size") if starts else None,
        job_id=next((e["job_id"] for e in reversed(events) if e.get("job_id")), None),
        last_row=_part(recent[-1], ("epoch", "test_accuracy", "images_per_second")) if recent else {},
        epoch_seconds=[
            row["epoch_seconds"]
            for row in recent
            if "epoch_seconds" in row and row.get("world_size") == recent[-1].get("world_size")
        ],
        best_accuracy=_best_accuracy(content),
    )


def _read(path: Any) -> bytes:
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return b""


def _part(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def _lines_backwards(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line), from the last line to the first."""
    end = len(content)
    while end >= 0:
        start = content.rfind(b"\n", 0, end) + 1
        yield start, content[start:end]
        end = start - 1


def _telling_rows(content: bytes) -> list[dict[str, Any]]:
    """The events, but for the routine before the last checkpoint of a job, which tells what that routine would.

    Of that routine there is the last checkpoint before a start or submission, where nothing says how the start before
    has ended.
    """
    before, end = b"", []
    for start, line in _lines_backwards(content):
        row = parse_row(line)
        if row is not None:
            end.append(row)
            if row.get("event") == "checkpoint" and row.get("job_id"):
                before = content[:start]
                break
    news: list[dict[str, Any]] = []
    routine: list[bytes] = []  # of a start that has not ended yet
    ended = False
    for line in before.split(b"\n"):
        if _ROUTINE.match(line):
            routine.append(line)
        elif (row := parse_row(line)) is not None:
            if row.get("event") in (*STARTS, *ENDS):
                if not ended and row["event"] in (*STARTS, AGAIN):
                    news += _last_checkpoint(routine)
                ended = row["event"] in ENDS
                routine.clear()
            news.append(row)
    return [*news, *reversed(end)]


def _last_checkpoint(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    rows = (parse_row(line) for line in reversed(lines) if b"checkpoint" in line)
    found = next((row for row in rows if row is not None and row.get("event") == "checkpoint"), None)
    return [found] if found is not None else []


def _last_word(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    known = [e for e in events if e.get("event") in TELLING]
    if not known:
        return {}
    # A cancelled job still writes what it does about it; that is no news, unless it started again or finished.
    since_start = itertools.takewhile(lambda e: e["event"] not in ("submitted", "resumed"), reversed(known))
    cancelled = [e for e in since_start if e["event"] == "cancelled"]
    return cancelled[0] if cancelled and known[-1]["event"] != "finished" else known[-1]


def _last_rows(content: bytes, count: int) -> list[dict[str, Any]]:
    rows = (row for _, line in _lines_backwards(content) if (row := parse_row(line)) is not None)
    return list(itertools.islice(rows, count))[::-1]


def _best_accuracy(content: bytes) -> Any:
    """The largest test accuracy; only the row that has it is parsed where every line shows one."""
    found = _ACCURACY.findall(content)
    if found and len(found) == content.count(b"\n"):
        best = max(found, key=float)
        at = content.index(_ACCURACY_IS % best)
        row = parse_row(content[content.rfind(b"\n", 0, at) + 1 : content.index(b"\n", at)])
        if row is not None and row.get("test_accuracy") == float(best):
            return row["test_accuracy"]
    return max((row["test_accuracy"] for row in parse_jsonl(content) if "test_accuracy" in row), default=None)


def losses(events: Sequence[Mapping[str, Any]]) -> Losses:
    """The losses among the starts of a run that have come to an end: all but the last one in events.jsonl.

    A start that finished or was stopped by a signal lost nothing, unless the next one began at an earlier step (its
    last checkpoint could not be written). A start that ended in any other way was killed, crashed or hung. Nobody
    wrote down when: it is taken to have run until its last event, so the rate of losses comes out a little too high.
    """
    count, seconds = 0, 0.0
    starts = [i for i, row in enumerate(events) if row.get("event") in ("started", "resumed")]
    for begin, end in pairwise(starts):
        rows = [row for row in events[begin:end] if row.get("restart") == events[begin].get("restart")]
        times = [t for row in rows if (t := _timestamp(row)) is not None]
        seconds += max(times, default=0.0) - min(times, default=0.0)
        last = next((row for row in reversed(rows) if row.get("event") in ("signal", "finished")), None)
        count += last is None or _step(events[end]) < _step(last)
    return Losses(count, seconds)


def start_and_last_word(
    events: Sequence[Mapping[str, Any]], job_id: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The newest start, if it is one of this job, and the last of LAST_EVENTS since then; each may be missing."""
    last = None
    for row in reversed(events):
        if row.get("event") in ("started", "resumed"):
            return (row, last) if row.get("job_id") == job_id else (None, None)
        if last is None and row.get("event") in LAST_EVENTS:
            last = row
    return None, None


def _timestamp(row: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(str(row.get("time"))).timestamp()
    except ValueError:
        return None


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
