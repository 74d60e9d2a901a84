"""Timeline of a run, from its two logs: waiting, starting, training, lost work; checkpoints, stops and restarts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cifar_hpc.runs import events as e
from cifar_hpc.runs.events import FAILURES, STARTS
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

WAITING, STARTING, TRAINING, LOST = "waiting", "starting", "training", "lost"
NOTHING = ""  # before the first event, and after an end until somebody submits again
MOST_STEPS = 1e12
YEARS = range(2000, 2100)  # other times are damage, and would leave nothing to be seen of the rest


@dataclass(frozen=True)
class Span:
    """Period of a run, in seconds since 1970.

    kind: WAITING (queued or requeued), STARTING (from the begin of the process to its first step), TRAINING, or LOST
        (trained, and trained again after the next start).
    """

    kind: str
    begin: float
    end: float


@dataclass(frozen=True)
class Mark:
    """Moment in a run.

    kind: checkpoint, restart, preempted, timeout, stopped, failed, hung, cancelled, finished; or `under way`, the last
        event of a run that has not ended.
    """

    kind: str
    at: float


@dataclass
class Timeline:
    """Timeline of one run.

    progress: for each attempt, (time, epochs done, parts included) from its start to its end.
    """

    run: RunPaths
    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    progress: list[list[tuple[float, float]]] = field(default_factory=list)

    @property
    def begin(self) -> float:
        """Time of its first event."""
        return min(self._all_moments(), default=0.0)

    @property
    def end(self) -> float:
        """Time of its last event."""
        return max(self._all_moments(), default=0.0)

    def _all_moments(self) -> list[float]:
        return [*(m for span in self.spans for m in (span.begin, span.end)), *(mark.at for mark in self.marks)]

    def seconds(self, kind: str) -> float:
        """Total length of the spans of a kind."""
        return sum(span.end - span.begin for span in self.spans if span.kind == kind)

    def moments(self, kind: str) -> list[float]:
        """Times of the marks of a kind."""
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
    """Timeline of one run; rows that make no sense are ignored.

    Raises:
        OSError: a log cannot be read.
    """
    rows = ({**row, "event": e.Evaluated.name} for row in read_jsonl(run.metrics))
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
    """Goes through the events in the order of their times."""

    def __init__(self, run: RunPaths, events: Sequence[_Event]) -> None:
        self.timeline = Timeline(run)
        self.events = events
        self.doing, self.since = NOTHING, 0.0
        self.heard = 0.0  # the last event so far
        self.safe: dict[float, float] = {0.0: 0.0}  # step -> when it was on disk
        self.steps_per_epoch = _steps_per_epoch(events)

    def read(self) -> Timeline:
        """The whole timeline."""
        for number, event in enumerate(self.events):
            if self._take(event, number):
                self._progress(event)
                self.heard = event.at
        if self.doing != NOTHING:
            self._mark("under way", self.heard)
        self._begin(NOTHING, self.heard)
        return self.timeline

    def _begin(self, doing: str, at: float) -> None:
        """Begin another span at `at`."""
        if self.doing and at > self.since:
            self.timeline.spans.append(Span(self.doing, self.since, at))
        self.doing, self.since = doing, at

    def _mark(self, kind: str, at: float) -> None:
        self.timeline.marks.append(Mark(kind, at))

    def _take(self, event: _Event, number: int) -> bool:
        """Apply an event; false for one that is not part of the timeline."""
        match event.name:
            case e.Submitted.name:
                if self.doing not in (STARTING, TRAINING):
                    self._begin(WAITING, event.at)
            case e.Started.name | e.Resumed.name:
                self._start(event)
            case e.FirstStep.name | e.Evaluated.name:
                self._continue(event)
            case e.Checkpoint.name:
                self._continue(event)
                self._mark("checkpoint", event.at)
                if event.step is not None:
                    self.safe[event.step] = event.at
            case e.Signal.name | e.Failed.name | e.Hang.name | e.Finished.name:
                self._stop(event, number)
            case e.Requeued.name:
                self._begin(WAITING, event.at)
            case e.Left.name:
                self._begin(NOTHING, event.at)
            case e.Cancelled.name:
                if self.doing == WAITING:
                    self._mark("cancelled", event.at)
                    self._begin(NOTHING, event.at)
            case _:
                return False
        return True

    def _start(self, event: _Event) -> None:
        again = WAITING if event.row.get("job_id") else NOTHING
        if self.doing in (STARTING, TRAINING):  # killed, some time after its last event
            self._begin(again, self.heard)
        elif self.doing == NOTHING and self.timeline.spans:  # requeued by Slurm
            self._begin(again, self.since)
        if event.step is not None:
            self._lost_since(max(at for step, at in self.safe.items() if step <= event.step))
        startup = event.row.get("startup")
        seconds = _number(startup.get("total"), 1e6) if isinstance(startup, dict) else None
        begin = max(event.at - (seconds or 0.0), self.since)
        self._begin(STARTING, begin)
        if event.name == e.Resumed.name or self.timeline.progress:
            self._mark("restart", begin)
        self.timeline.progress.append([])

    def _continue(self, event: _Event) -> None:
        if self.doing == STARTING:
            self._begin(TRAINING, event.at if event.name == e.FirstStep.name else self.heard)
        elif not self.timeline.progress:  # events.jsonl is lost
            self.timeline.progress.append([])
            self._begin(TRAINING, event.at - (event.number("epoch_seconds", 1e6) or 0.0))

    def _stop(self, event: _Event, number: int) -> None:
        kind = {e.Hang.name: "hung", e.Signal.name: self._why(number)}.get(event.name, event.name)
        if event.name in (e.Signal.name, e.Finished.name) and event.step is not None:
            self.safe[event.step] = event.at  # an orderly end, which comes after its checkpoint
        self._mark(kind, event.at)
        self._begin(NOTHING, event.at)

    def _why(self, number: int) -> str:
        """Reason of a signal, from the event that answered it."""
        replies = (e.Requeued.name, e.Left.name)
        answer = next((a for a in self.events[number:] if a.name in (*replies, *STARTS, e.Submitted.name)), None)
        reason = answer.row.get("reason") if answer and answer.name in replies else None
        return {"preemption": "preempted", "timeout": "timeout"}.get(str(reason), "stopped")

    def _lost_since(self, moment: float) -> None:
        """Mark training after `moment` as lost."""
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
        if not lines or step is None or self.steps_per_epoch is None or event.name == e.Checkpoint.name:
            return
        epochs = step / self.steps_per_epoch
        # If all processes were killed, no later step than that of the last checkpoint is known.
        if event.name not in FAILURES or not lines[-1] or epochs > lines[-1][-1][1]:
            lines[-1].append((event.at, epochs))


def _steps_per_epoch(events: Sequence[_Event]) -> float | None:
    for event in reversed(events):
        epoch, step = event.number("epoch", MOST_STEPS), event.step
        if event.name == e.Evaluated.name and epoch and step:
            return step / epoch
    return None
