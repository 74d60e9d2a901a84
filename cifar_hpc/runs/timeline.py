"""Timeline of a run, from its two logs: waiting, starting, training, lost work; checkpoints, stops and restarts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cifar_hpc.runs import events as e
from cifar_hpc.runs.events import FAILURES, STARTS
from cifar_hpc.runs.history import Row, number_of, startup_of, time_of
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

WAITING, STARTING, TRAINING, LOST = "waiting", "starting", "training", "lost"
NOTHING = ""  # before the first event, and after an end until somebody submits again
MOST_SECONDS = 1e6  # of an epoch
# The years 2000 to 2099 in seconds since 1970: other times are damage, and would leave nothing to be seen of the rest.
EARLIEST, LATEST = 946_684_800, 4_102_444_800
_REASONS = {"preemption": "preempted", "requested": "requeued", "requeued": "requeued", "timeout": "timeout"}


class Span(NamedTuple):
    """Period of a run, in seconds since 1970.

    kind: WAITING (queued or requeued), STARTING (from the begin of the process to its first step), TRAINING, or LOST
        (trained, and trained again after the next start).
    """

    kind: str
    begin: float
    end: float


class Mark(NamedTuple):
    """Moment in a run.

    kind: checkpoint, restart, preempted, requeued (by a person, perhaps by Slurm), timeout, stopped, failed, hung,
        cancelled, finished; or `under way`, the last event of a run that has not ended.
    """

    kind: str
    at: float


@dataclass
class Timeline:
    """Timeline of one run.

    progress: for each attempt, (time, epochs done, parts included) from its start to its end.
    """

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


def read_timeline(run: RunPaths) -> Timeline:
    """Timeline of one run; rows that make no sense are ignored.

    Raises:
        OSError: a log cannot be read.
    """
    rows = [*read_jsonl(run.events), *({**row, "event": e.Evaluated.name} for row in read_jsonl(run.metrics))]
    timed = [(at, row) for row in rows if (at := time_of(row)) is not None and EARLIEST <= at < LATEST]
    return _Reader(sorted(timed, key=lambda event: event[0])).read()


class _Reader:
    """Goes through the events in the order of their times."""

    def __init__(self, events: Sequence[tuple[float, Row]]) -> None:
        self.timeline = Timeline()
        self.events = events
        self.doing, self.since = NOTHING, 0.0
        self.heard = 0.0  # the last event so far
        self.job_id: Any = None  # of the last start
        self.safe: dict[float, float] = {0.0: 0.0}  # step -> when it was on disk
        self.steps_per_epoch = _steps_per_epoch(events)

    def read(self) -> Timeline:
        """The whole timeline."""
        for number, (at, row) in enumerate(self.events):
            name, step = str(row.get("event")), number_of(row, "step")
            match name:
                case e.Submitted.name if self.doing in (STARTING, TRAINING):
                    if row.get("job_id") == self.job_id:  # recorded after its job had begun
                        continue
                    self._begin(NOTHING, self.heard)  # killed, some time after its last event
                    self._begin(WAITING, at)
                case e.Submitted.name | e.Requeued.name:
                    self._begin(WAITING, at)
                case e.Started.name | e.Resumed.name:
                    self._start(at, row, step)
                case e.FirstStep.name | e.Evaluated.name | e.Checkpoint.name:
                    self._continue(at, row)
                    if name == e.Checkpoint.name:
                        self._mark("checkpoint", at)
                case e.Signal.name | e.Failed.name | e.Hang.name | e.Finished.name:
                    kinds = {e.Hang.name: "hung", e.Signal.name: self._why(number)}
                    self._mark(kinds.get(name, name), at)
                    self._begin(NOTHING, at)
                case e.Left.name:
                    self._begin(NOTHING, at)
                case e.Cancelled.name:
                    if self.doing == WAITING:
                        self._mark("cancelled", at)
                        self._begin(NOTHING, at)
                case _:
                    continue
            # An orderly end comes after its checkpoint.
            if name in (e.Checkpoint.name, e.Signal.name, e.Finished.name) and step is not None:
                self.safe[step] = at
            self._progress(at, name, step)
            self.heard = at
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

    def _start(self, at: float, row: Row, step: float | None) -> None:
        self.job_id = row.get("job_id")
        again = WAITING if self.job_id else NOTHING
        if self.doing in (STARTING, TRAINING):  # killed, some time after its last event
            self._begin(again, self.heard)
        elif self.doing == NOTHING and self.timeline.spans:  # requeued by Slurm
            self._begin(again, self.since)
        if step is not None:
            kept = max(moment for safe, moment in self.safe.items() if safe <= step)
            self.timeline.spans = [part for span in self.timeline.spans for part in _cut(span, kept)]
        begin = max(at - startup_of(row), self.since)
        self._begin(STARTING, begin)
        if row["event"] == e.Resumed.name or self.timeline.progress:
            self._mark("restart", begin)
        self.timeline.progress.append([])

    def _continue(self, at: float, row: Row) -> None:
        if self.doing == STARTING:
            self._begin(TRAINING, at if row["event"] == e.FirstStep.name else self.heard)
        elif not self.timeline.progress:  # events.jsonl is lost
            self.timeline.progress.append([])
            self._begin(TRAINING, at - (number_of(row, "epoch_seconds", MOST_SECONDS) or 0.0))

    def _why(self, number: int) -> str:
        """Reason of a signal, from the event that answered it."""
        for _, row in self.events[number:]:
            if row.get("event") in (e.Requeued.name, e.Left.name):
                return _REASONS.get(str(row.get("reason")), "stopped")
            if row.get("event") in (*STARTS, e.Submitted.name):
                break
        return "stopped"

    def _progress(self, at: float, name: str, step: float | None) -> None:
        lines = self.timeline.progress
        # A checkpoint is reported when it is on disk, some steps after those that are in it.
        if not lines or step is None or self.steps_per_epoch is None or name == e.Checkpoint.name:
            return
        epochs = step / self.steps_per_epoch
        # If all processes were killed, no later step than that of the last checkpoint is known.
        if name not in FAILURES or not lines[-1] or epochs > lines[-1][-1][1]:
            lines[-1].append((at, epochs))


def _cut(span: Span, kept: float) -> list[Span]:
    """A span whose training after the moment `kept` was lost."""
    if span.kind != TRAINING:
        return [span]
    parts = (span._replace(end=min(span.end, kept)), Span(LOST, max(span.begin, kept), span.end))
    return [part for part in parts if part.begin < part.end]


def _steps_per_epoch(events: Sequence[tuple[float, Row]]) -> float | None:
    evaluated = (row for _, row in reversed(events) if row.get("event") == e.Evaluated.name)
    pairs = ((number_of(row, "step"), number_of(row, "epoch")) for row in evaluated)
    return next((step / epoch for step, epoch in pairs if step and epoch), None)
