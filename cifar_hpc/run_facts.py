"""What a run's events.jsonl and metrics.jsonl say in sum, from as few of their rows as that takes.

A run of 400 epochs has a thousand rows, and there may be thousands of runs. Rows are left out by what they begin with,
in the spelling of `append_event`; whatever is spelt otherwise or damaged is read in full.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar_hpc.jsonfile import NotRegularError, read_regular
from cifar_hpc.paths import RunPaths
from cifar_hpc.restarts import AGAIN, ENDS, STARTS, restarts_of
from cifar_hpc.runlog import count_requeues, count_starts, parse_jsonl, parse_row

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
