"""The history of a run: one fold over its events, which every reader of events.jsonl uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import Any

from cifar_hpc.runs import events
from cifar_hpc.runs.events import FAILURES, STARTS, STATES, Event
from cifar_hpc.runs.logs import read_jsonl

Row = Mapping[str, Any]

# Causes of the next attempt that are no reason of an event: a user submitted the run again, or no event says why.
SUBMITTED, KILLED = "submitted", "killed"
# Events by which an attempt ends or announces its end; a submission ends it, too.
_OWN_ENDS = (events.Requeued.name, events.Left.name, *FAILURES, events.Holding.name, events.Finished.name)
# Events of a start that finds the run finished, which say nothing about the run.
_SURPLUS = (
    *(events.Attempted.name, events.Requeued.name, events.RequeueFailed.name, events.Left.name, events.Holding.name),
    events.Cancelled.name,
)


@dataclass(frozen=True)
class Losses:
    """Number of times that work was lost, and the seconds of running in which that happened."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class Attempt:
    """One start of a run. Times are in seconds since 1970, None where the event has none.

    start: when it was ready to train; of one that never was, its end.
    end: its last checkpoint, or the event that ended it after a signal: what came after is computed again.
    heard: its last own event.
    cause: of the next attempt: preemption, timeout, failure, ..., SUBMITTED or KILLED.
    stop_step: where it finished or stopped on a signal; None after any other end.
    begun: whether it was ready to train; until then only its batch script has spoken.
    restart_count: how often Slurm had restarted its job; None where no batch script says that.
    startup: seconds from the beginning of its process until it was ready.
    said: the last event that ends or announces its end; empty where there is none, and in progress.json.
    """

    step: int
    restart: Any
    job_id: Any
    world_size: int | None
    start: float | None
    end: float | None
    heard: float | None
    ended: bool = False
    cause: str = KILLED
    stop_step: int | None = None
    begun: bool = True
    restart_count: int | None = None
    startup: float = 0.0
    said: dict[str, Any] = field(default_factory=dict, compare=False)

    def add(self, name: str, row: Row) -> None:
        """Apply an event that came after the start."""
        time = time_of(row)
        if row.get("restart") == self.restart:
            self.heard = max(filter(None, (self.heard, time)), default=None)
            if name in (events.Signal.name, events.Finished.name):
                self.stop_step = step_of(row)
        if name in (*_OWN_ENDS, events.Submitted.name):
            self.cause, self.ended = _cause(name, row, self.cause), True
            if self.cause != SUBMITTED and (self.stop_step is not None or not self.begun):
                self.end = time
            self.start = self.start if self.begun else self.end
        elif name == events.Checkpoint.name:
            self.end = time
        if name in (*_OWN_ENDS, events.Signal.name, events.RequeueFailed.name):
            self.said = dict(row)


@dataclass
class History:
    """Summary of the events so far.

    requeues: by cause, but for those that were refused; `requeues_since_submission` are those that limits count.
    failed_step: step of the last failure since the last submission, but for those that were a node's fault.
    state: the event that says what the state of the run is where it has no job; empty before the first.
    last: the last event of each kind, but for starts; a cancellation until the next submission or attempt, a request to
        requeue until the next attempt.
    """

    attempts: list[Attempt] = field(default_factory=list)
    requeues: dict[str, int] = field(default_factory=dict)
    requeues_since_submission: dict[str, int] = field(default_factory=dict)
    failed_step: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    job_id: str | None = None

    @classmethod
    def of(cls, rows: Iterable[Row]) -> History:
        """Fold the rows of events.jsonl, in their order."""
        history = cls()
        for row in rows:
            history.add(row)
        return history

    @classmethod
    def read(cls, path: Path) -> History:
        """Fold events.jsonl; a missing file is empty."""
        return cls.of(read_jsonl(path))

    def add(self, row: Row) -> None:
        """Apply one more event."""
        name = row.get("event")
        if not isinstance(name, str):
            return
        job_id = row.get("job_id")
        self.job_id = job_id if isinstance(job_id, str) and job_id else self.job_id
        kept = dict(row)
        over = self.state.get("event") == events.Finished.name
        if name in (*STARTS, events.Attempted.name):
            kept = {"event": name, "time": row.get("time")}  # without the environment
            # A job that starts after its run has finished has nothing to do, and no end to report. An unknown one is of
            # a submission for more epochs, which may be recorded later.
            known = [*(attempt.job_id for attempt in self.attempts), self.last_of(events.Submitted).get("job_id")]
            if name in STARTS or not over or job_id not in known:
                self._start(name, row)
        elif (speaking := self._speaking(job_id, row.get("restart"))) is not None:
            speaking.add(name, row)
        elif name == events.Submitted.name and self._announced(job_id):
            for before in self.attempts[-2:-1]:  # the job began before its submission was recorded
                before.add(name, row)
        elif self.attempts:
            self.attempts[-1].add(name, row)
        if name not in STARTS:
            self.last[name] = kept
        if name in (events.Submitted.name, events.Resumed.name):
            self.last.pop(events.Cancelled.name, None)
        if name == events.Submitted.name:
            self.requeues_since_submission, self.failed_step = {}, None
        elif name == events.Requeued.name:
            self._count(str(row.get("reason")), 1)
        elif name == events.RequeueFailed.name and (refused := self.last_of(events.Requeued)):
            self._count(str(refused.get("reason")), -1)
        elif name in FAILURES and not row.get("bad_node"):
            self.failed_step = step_of(row)
        if name in STATES and not (over and name in _SURPLUS):
            # What a cancelled attempt still does about it is no news.
            self.state = kept if name == events.Finished.name else self.last.get(events.Cancelled.name, kept)

    def _start(self, name: str, row: Row) -> None:
        """Add an attempt, or let the one begin that its batch script has announced."""
        job_id, time, size, count = row.get("job_id"), time_of(row), row.get("world_size"), row.get("restart_count")
        restart = row.get("restart")
        begun = name in STARTS
        announced = begun and self._announced(job_id)
        if begun:
            count = self.attempts.pop().restart_count if announced else None
        else:
            restart = len(self.attempts)
        ranks, count = (n if isinstance(n, int) else None for n in (size, count))
        new = Attempt(step_of(row), restart, job_id, ranks, time, time, time, begun=begun, restart_count=count)
        new.startup = startup_of(row)
        if not announced:
            self.last.pop(events.RequeueRequested.name, None)
        self.attempts.append(new)

    def _speaking(self, job_id: Any, restart: Any) -> Attempt | None:
        """The newest attempt of this job and restart: nearly always the last, also after thousands of them."""
        return next((a for a in reversed(self.attempts) if a.job_id == job_id and a.restart == restart), None)

    def _announced(self, job_id: Any) -> bool:
        """True if the newest attempt is one of this job, and only its batch script has spoken."""
        last = self.attempts[-1] if self.attempts else None
        return last is not None and not last.begun and not last.ended and last.job_id == job_id

    def _count(self, reason: str, change: int) -> None:
        for counts in (self.requeues, self.requeues_since_submission):
            counts[reason] = max(0, counts.get(reason, 0) + change)

    def earlier_than(self, job_id: str | None) -> int:
        """Number of attempts before the one that starts now in a job."""
        return len(self.attempts) - self._announced(job_id)

    def last_of(self, event: type[Event]) -> dict[str, Any]:
        """The last event of a kind (see `last`); empty where there is none."""
        return self.last.get(event.name, {})

    def attempt_of(self, job_id: str, restart_count: int) -> Attempt | None:
        """The attempt of this start of a job; None if it is not known, or the run was submitted again since."""
        newest = next((a for a in reversed(self.attempts) if a.job_id == job_id), None)
        known = newest is not None and newest.restart_count in (None, restart_count) and newest.cause != SUBMITTED
        return newest if known else None

    @property
    def restart_causes(self) -> dict[str, int]:
        """Number of attempts after the first, by cause."""
        return dict(Counter(attempt.cause for attempt in self.attempts[:-1]))

    @property
    def up_seconds(self) -> float:
        """Time between the start and the end of each attempt, as far as events tell."""
        return sum(_seconds(attempt.start, attempt.end) for attempt in self.attempts)

    @property
    def device_seconds(self) -> float:
        """Time of all processes, each with its GPU or its share of the CPU, from its beginning to its last event.

        Starting and work that was lost count, queueing does not.
        """
        sizes: Iterable[int] = (max(0, min(a.world_size or 0, 10**6)) for a in self.attempts)  # a file may say anything
        times = (_seconds(a.start, max(a.heard or 0.0, a.end or 0.0)) + a.startup for a in self.attempts)
        return float(sum(map(mul, sizes, times)))

    @property
    def lost_seconds(self) -> float:
        """Time from the end of each attempt to the next start: computing again, queueing, starting.

        The time until a user submits again is not lost.
        """
        pairs = pairwise(self.attempts)
        return sum(_seconds(a.end, a.heard if a.cause == SUBMITTED else after.start) for a, after in pairs)

    @property
    def losses(self) -> Losses:
        """Losses of work in all attempts but the newest.

        An attempt that finished or stopped on a signal lost nothing, unless the next one began at an earlier step (its
        last checkpoint could not be written). Any other one was killed, crashed or hung. Its end is not recorded: it
        counts as running until its last event, so the rate of losses comes out a little too high. One that never began
        had nothing to lose.
        """
        begun = [attempt for attempt in self.attempts if attempt.begun]
        lost = [a.stop_step is None or after.step < a.stop_step for a, after in pairwise(begun)]
        return Losses(sum(lost), sum(_seconds(a.start, a.heard) for a in begun[:-1]))


def _cause(name: str, row: Row, before: str) -> str:
    """Cause of the next attempt after one more event: the latest counts, and a submission above all."""
    if SUBMITTED in (before, name):
        return SUBMITTED
    if name == events.Requeued.name or (name == events.Left.name and row.get("reason") in events.BY_SLURM):
        return str(row.get("reason"))
    if name in FAILURES:
        return "failure"
    if name == events.Holding.name and before == KILLED:
        return "preemption"  # it was warned, and could not ask Slurm why
    return before


def time_of(row: Row) -> float | None:
    """Time of an event in seconds since 1970; None where it has none."""
    try:
        instant = datetime.fromisoformat(row["time"])
        return instant.timestamp() if instant.tzinfo is not None else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def number_of(row: Row, key: str, most: float = 1e12) -> float | None:
    """A field that is a number between 0 and `most`; None for anything else."""
    value: Any = row.get(key)
    return float(value) if type(value) in (int, float) and 0 <= value <= most else None


def startup_of(row: Row) -> float:
    """Seconds that a start took; 0 where its event does not say it."""
    startup = row.get("startup")
    return (number_of(startup, "total", 1e6) if isinstance(startup, dict) else None) or 0.0


def step_of(row: Row) -> int:
    """Step of an event; 0 where it has none."""
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _seconds(begin: float | None, end: float | None) -> float:
    return max(0.0, end - begin) if begin is not None and end is not None else 0.0
