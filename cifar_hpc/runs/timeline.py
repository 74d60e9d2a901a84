"""A run's life from its two logs: when it waited, started and trained, what stopped it, and what it had to do again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

WAITING, STARTING, TRAINING, LOST = "waiting", "starting", "training", "lost"
NOTHING = ""  # before the first event, and after an end until somebody submits again
MOST_STEPS = 1e12
YEARS = range(2000, 2100)  # other times are damage, and would leave nothing to be seen of the rest


@dataclass(frozen=True)
class Span:
    """What a run did from `begin` to `end`, in seconds since 1970: WAITING (queued or requeued), STARTING (from the
    process's begin to its first step), TRAINING, or LOST (trained, and done again after the next start)."""

    kind: str
    begin: float
    end: float


@dataclass(frozen=True)
class Mark:
    """What happened at a moment; kind: checkpoint, restart, preempted, timeout, stopped, failed, hung, cancelled,
    finished; or `under way`, when it was last heard of and has not ended."""

    kind: str
    at: float


@dataclass
class Timeline:
    """The life of one run.

    progress: for each start, (time, epochs done, parts included) from its beginning to its end.
    """

    run: RunPaths
    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    progress: list[list[tuple[float, float]]] = field(default_factory=list)

    @property
    def begin(self) -> float:
        """When it was first heard of."""
        return min(self._all_moments(), default=0.0)

    @property
    def end(self) -> float:
        """When it was last heard of."""
        return max(self._all_moments(), default=0.0)

    def _all_moments(self) -> list[float]:
        return [*(m for span in self.spans for m in (span.begin, span.end)), *(mark.at for mark in self.marks)]

    def seconds(self, kind: str) -> float:
        """How long it did so in all."""
        return sum(span.end - span.begin for span in self.spans if span.kind == kind)

    def moments(self, kind: str) -> list[float]:
        """When that happened."""
        return [mark.at for mark in self.marks if mark.kind == kind]


@dataclass(frozen=True)
class _Event:
    at: float
    name: str
    row: Mapping[str, Any]

    def number(self, key: str, most: float) -> float | None:
        """A field that is a number between 0 and `most`."""
        return _number(self.row.get(key), most)

    @property
    def step(self) -> float | None:
        return self.number("step", MOST_STEPS)


def read_timeline(run: RunPaths) -> Timeline:
    """The life of one run; what makes no sense in its logs is passed over.

    Raises:
        OSError: a log cannot be read.
    """
    rows = ({**row, "event": "evaluated"} for row in read_jsonl(run.metrics))
    events = [event for row in (*read_jsonl(run.events), *rows) if (event := _event(row)) is not None]
    return _Reader(run, sorted(events, key=lambda event: event.at)).read()


def _event(row: Mapping[str, Any]) -> _Event | None:
    try:
        moment = datetime.fromisoformat(row["time"])
        return _Event(moment.timestamp(), str(row["event"]), row) if moment.year in YEARS else None
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def _number(value: Any, most: float) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= most else None


class _Reader:
    """Goes through the events, and keeps what the run is doing."""

    def __init__(self, run: RunPaths, events: Sequence[_Event]) -> None:
        self.timeline = Timeline(run)
        self.events = events
        self.doing, self.since = NOTHING, 0.0
        self.heard = 0.0  # the last moment at which it was surely doing so
        self.safe: dict[float, float] = {0.0: 0.0}  # step -> when it was on disk
        self.steps_per_epoch = _steps_per_epoch(events)

    def read(self) -> Timeline:
        """The whole timeline."""
        take = {
            "submitted": self._submitted,
            "started": self._start,
            "resumed": self._start,
            "first_step": self._go_on,
            "evaluated": self._go_on,
            "checkpoint": self._checkpoint,
            "signal": self._stop,
            "failed": self._stop,
            "hang": self._stop,
            "finished": self._stop,
            "requeued": self._requeued,
            "left": self._left,
            "cancelled": self._cancelled,
        }
        for number, event in enumerate(self.events):
            if event.name in take:
                take[event.name](event, number)
                self._progress(event)
                self.heard = event.at
        if self.doing != NOTHING:
            self._mark("under way", self.heard)
        self._begin(NOTHING, self.heard)
        return self.timeline

    def _begin(self, doing: str, at: float) -> None:
        """It does something else from `at` on."""
        if self.doing and at > self.since:
            self.timeline.spans.append(Span(self.doing, self.since, at))
        self.doing, self.since = doing, at

    def _mark(self, kind: str, at: float) -> None:
        self.timeline.marks.append(Mark(kind, at))

    def _submitted(self, event: _Event, number: int) -> None:
        if self.doing not in (STARTING, TRAINING):
            self._begin(WAITING, event.at)

    def _requeued(self, event: _Event, number: int) -> None:
        self._begin(WAITING, event.at)

    def _left(self, event: _Event, number: int) -> None:
        self._begin(NOTHING, event.at)

    def _cancelled(self, event: _Event, number: int) -> None:
        if self.doing == WAITING:
            self._mark("cancelled", event.at)
            self._begin(NOTHING, event.at)

    def _start(self, event: _Event, number: int) -> None:
        again = WAITING if event.row.get("job_id") else NOTHING
        if self.doing in (STARTING, TRAINING):  # killed without a word, at some time since it was last heard of
            self._begin(again, self.heard)
        elif self.doing == NOTHING and self.timeline.spans:  # requeued by Slurm
            self._begin(again, self.since)
        if event.step is not None:
            self._lost_since(max(at for step, at in self.safe.items() if step <= event.step))
        startup = event.row.get("startup")
        seconds = _number(startup.get("total"), 1e6) if isinstance(startup, dict) else None
        begin = max(event.at - (seconds or 0.0), self.since)
        self._begin(STARTING, begin)
        if event.name == "resumed" or self.timeline.progress:
            self._mark("restart", begin)
        self.timeline.progress.append([])

    def _go_on(self, event: _Event, number: int) -> None:
        if self.doing == STARTING:
            self._begin(TRAINING, event.at if event.name == "first_step" else self.heard)
        elif not self.timeline.progress:  # events.jsonl is lost
            self.timeline.progress.append([])
            self._begin(TRAINING, event.at - (event.number("epoch_seconds", 1e6) or 0.0))

    def _checkpoint(self, event: _Event, number: int) -> None:
        self._go_on(event, number)
        self._mark("checkpoint", event.at)
        if event.step is not None:
            self.safe[event.step] = event.at

    def _stop(self, event: _Event, number: int) -> None:
        kind = {"signal": "stopped", "hang": "hung"}.get(event.name, event.name)
        if event.name == "signal":
            kind = self._why(number)
        if event.name in ("signal", "finished") and event.step is not None:
            self.safe[event.step] = event.at  # an orderly end, which comes after its checkpoint
        self._mark(kind, event.at)
        self._begin(NOTHING, event.at)

    def _why(self, number: int) -> str:
        """Why a signal came, which what came of it tells."""
        answers = (e for e in self.events[number:] if e.name in ("requeued", "left", "started", "resumed", "submitted"))
        answer = next(answers, None)
        reason = answer.row.get("reason") if answer and answer.name in ("requeued", "left") else None
        return {"preemption": "preempted", "timeout": "timeout"}.get(str(reason), "stopped")

    def _lost_since(self, moment: float) -> None:
        """What was trained after `moment` is done again."""
        spans = []
        for span in self.timeline.spans:
            if span.kind == TRAINING and span.end > moment:
                cut = max(span.begin, moment)
                spans += [Span(TRAINING, span.begin, cut)] if cut > span.begin else []
                span = Span(LOST, cut, span.end)
            spans.append(span)
        self.timeline.spans = spans

    def _progress(self, event: _Event) -> None:
        lines, step = self.timeline.progress, event.step
        # A checkpoint is reported when it is on disk, some steps after those that are in it.
        if not lines or step is None or self.steps_per_epoch is None or event.name == "checkpoint":
            return
        epochs = step / self.steps_per_epoch
        # Where all processes were killed, nobody knows of a later step than the last checkpoint's.
        if event.name not in ("failed", "hang") or not lines[-1] or epochs > lines[-1][-1][1]:
            lines[-1].append((event.at, epochs))


def _steps_per_epoch(events: Sequence[_Event]) -> float | None:
    for event in reversed(events):
        epoch, step = event.number("epoch", MOST_STEPS), event.step
        if event.name == "evaluated" and epoch and step:
            return step / epoch
    return None
