"""The state of a run now, from its logs, its lock and the queue."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc.errors import UserError
from cifar_hpc.files import open_regular
from cifar_hpc.runs import lock as runlock
from cifar_hpc.runs.eta import last_progress, seconds_left
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import Facts, instant_of, read_facts
from cifar_hpc.runs.lock import controller_of
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.slurm import reasons as waiting
from cifar_hpc.slurm.client import QueuedJob


def in_the_queue(job: QueuedJob, last_word: Mapping[str, Any], now: datetime) -> tuple[str, str]:
    """(state, detail) of a run that has a job.

    Args:
        last_word: as `Facts` has it.
        now: with a zone.
    """
    if job.waits:
        start = waiting.start_of(job)
        begin = f"not before {waiting.clock(start, now)}" if start is not None else "waits for its begin time"
        if job.reason == "BeginTime" and last_word.get("event") == "submitted":
            return "queued", f"BeginTime: {begin}"
        if job.reason != "BeginTime":
            return "queued", ", ".join(filter(None, (waiting.why(job), waiting.expected(start, now))))
        cause = _REQUEUED.get(str(last_word.get("reason"))) if last_word.get("event") in ("requeued", "left") else None
        until = f"until {waiting.clock(start, now)}" if start is not None else "waits for its begin time"
        return "requeued", ", ".join(filter(None, (until, cause)))
    if job.state in (*ALIVE, "CONFIGURING"):
        return "running", f"on {job.nodes}"
    if job.state == "SUSPENDED":
        return "suspended", f"by Slurm, on {job.nodes}"
    return "stopping", f"{job.state}: {_STOPPING.get(str(last_word.get('event')), 'Slurm ends the job')}"


_REQUEUED = {"preemption": "preempted", "timeout": "at its time limit", "failure": "after a failure"}
_STOPPING = {
    "finished": "the run has finished",
    "requeued": "to be requeued",
    "failed": "the run has failed",
    "hang": "the run has failed",
    "cancelled": "it was cancelled",
}


def afterwards(event: Mapping[str, Any]) -> tuple[str, str]:
    """(state, detail) once the job is gone, from the last event that says something about it."""
    name = event["event"]
    if name == "finished":
        return "finished", f"{event.get('test_accuracy', float('nan')):.2f}%"
    if name in ("failed", "hang"):
        return "failed", _failure(event)
    if name == "cancelled":
        return "cancelled", f"by {event.get('by', '?')}"
    if name == "left" and event.get("reason") == "ended":
        return "cancelled", "by scancel, or its node was lost"
    if name == "left":
        return "stopped", str(event.get("explanation", ""))
    return "stopped", f"{_SUBMIT_AGAIN[name]}; submit again to go on"


def told_its_end(event: Mapping[str, Any]) -> bool:
    """Whether the run itself has said that it ended, so that this need not be taken from its job being gone."""
    return event["event"] not in _SUBMIT_AGAIN


def _failure(event: Mapping[str, Any]) -> str:
    """The reason of a failure, without the names of this project's own exceptions."""
    words = re.sub(r"^(User|Spec|RunFailed|RanksLost|Scheduler|RunBusy)Error: ", "", str(event.get("error", "")))
    if event.get("event") == "hang":
        return f"hung: {words}"
    known = event.get("cause") == "out_of_memory" and "out of memory" not in words.lower()
    return f"out of memory: {words}" if known else words


_SUBMIT_AGAIN = {
    "submitted": "its job is gone from the queue",
    "started": "it ended without a word (killed?)",
    "resumed": "it ended without a word (killed?)",
    "checkpoint": "it ended without a word (killed?)",
    "requeued": "its requeued job is gone from the queue",
    "holding": "Slurm ended the job",
}

# A log that has been silent for this many of its intervals (and at least this many seconds) is a hung run.
HUNG_INTERVALS, HUNG_SECONDS = 10, 300
# epochs and log_seconds of a spec as `freeze` writes it.
_PACE = re.compile(
    rb"# The frozen spec of run [^\n]*\n(?:[^\n]*\n)*?train:\n"
    rb"(?:  [^\n]*\n)*?  epochs: ([0-9]+)\n(?:  [^\n]*\n)*?  log_seconds: ([0-9]+\.[0-9]+)\n"
)
PACE_BYTES = 64 * 1024
WAITING = ("queued", "requeued")
AT_WORK = ("running", "hung", "suspended", "stopping")
ENDED = ("finished", "failed", "cancelled", "stopped", "not started", "unreadable")
UNKNOWN = "unknown"
CLOCKS_DIFFER = 2.0  # seconds, between the machine that looks and one that writes events
# What reading files that are damaged, or not of this project, may lead to.
_DAMAGE = (UserError, OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class RunState:
    """One run, as `status --json` shows it (`plain`)."""

    run: str
    state: str
    detail: str
    epoch: int
    epochs: int
    test_accuracy: float | None
    best_accuracy: float | None
    images_per_second: float | None
    eta_seconds: float | None
    restarts: int
    requeues: dict[str, int] = field(default_factory=dict)
    world_size: int | None = None
    job_id: str | None = None
    log_age_seconds: float | None = None
    reason: str | None = None
    start_time: str | None = None
    epoch_progress: float | None = None
    restart_causes: dict[str, int] = field(default_factory=dict)
    lost_seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more unless somebody submits again."""
        return self.state in ENDED

    def plain(self) -> dict[str, Any]:
        """One object of the list that `status --json` prints. Keys are only ever added; all are always there.

        run: str, the run's name.
        state: queued, requeued (waiting after a requeue for the time from which it may start), running, hung (no line
            in its log for much longer than train.log_seconds), suspended (by Slurm), stopping (Slurm ends the job),
            finished, failed, cancelled, stopped (ended otherwise; submitted again, it goes on), not started (never
            submitted), unreadable (its files make no sense or cannot be read, and it has no job), or unknown (Slurm
            does not answer, or has not been asked since the run was submitted).
        detail: str, why, for people; its wording may change.
        epoch, epochs: int, finished ones and those of the spec.
        test_accuracy, best_accuracy: float or null, %, of the last finished epoch and the best one.
        images_per_second: float or null, training images, at the last line of progress or over the last finished epoch.
        eta_seconds: float or null, until the end (`time_left`); null where it has ended, hangs, or cannot be told.
        restarts: int, starts after the first.
        requeues: {cause: int}, requeues that the run asked for itself: preemption, timeout, failure.
        world_size: int or null, ranks of the last start.
        job_id: str or null, of the job in the queue, else of the last one.
        log_age_seconds: float or null, since the last line of train.log.
        reason: str or null, Slurm's own code of why the job waits, such as Priority.
        start_time: str or null, ISO 8601 in UTC: when Slurm expects to start a waiting job; of a requeued one, the time
            before which it does not start.
        epoch_progress: float or null, the part of the epoch under way that is done, 0 to 1.
        restart_causes: {cause: int}, all restarts: preemption, timeout, failure, killed (without a warning), submitted
            (again, by a person). Unlike `requeues` it has those that Slurm saw to itself.
        lost_seconds: float, what the restarts have cost, but those after submitting again (`restarts.restarts_of`).
        """
        unknown = {key for key, value in vars(self).items() if isinstance(value, float) and not math.isfinite(value)}
        return {key: None if key in unknown else value for key, value in vars(self).items()}


def read_state(
    paths: RunPaths,
    jobs: Mapping[str, QueuedJob] | None,
    facts_of: Callable[[RunPaths], Facts] = read_facts,
    asked_at: float | None = None,
) -> RunState:
    """The state of one run; where its files are damaged or not of this project, what its job or lock tells.

    Args:
        jobs: as `slurm.queue` returns them; None where Slurm does not answer.
        facts_of: where the facts of the logs come from.
        asked_at: when Slurm was asked for `jobs`, in seconds since the epoch: of a run that was heard of since then
            they cannot tell that it has no job.
    """
    job = jobs.get(paths.name) if jobs is not None else None
    now = datetime.now(UTC)
    try:
        facts = facts_of(paths)
        state, detail = _busy(paths, job, facts.last_word, facts.submitted, now) or _without_a_job(
            facts, jobs is not None, asked_at
        )
        return _checked(_state_of(paths, job, facts, state, detail, now))
    except OSError as error:
        trouble = f"its files cannot be read now ({error.strerror or error})"
    except _DAMAGE as error:
        trouble = f"its files make no sense ({type(error).__name__}: {error})"
    state, detail = "unreadable", trouble
    with contextlib.suppress(*_DAMAGE):
        if (busy := _busy(paths, job, {}, {}, now)) is not None:
            state, detail = busy[0], f"{busy[1]}; {trouble}"
    return RunState(paths.name, state, detail, 0, 0, None, None, None, None, 0, job_id=job.job_id if job else None)


def _checked(state: RunState) -> RunState:
    figures = (state.test_accuracy, state.best_accuracy, state.images_per_second)
    numbers = (*figures, state.world_size)
    if all(isinstance(n, (int, float, types.NoneType)) for n in numbers) and isinstance(state.job_id or "", str):
        test, best, speed = (None if figure is None else float(figure) for figure in figures)
        return dataclasses.replace(state, test_accuracy=test, best_accuracy=best, images_per_second=speed)
    raise ValueError("text where a number should be, or a number where text should be")


def _state_of(paths: RunPaths, job: QueuedJob | None, facts: Facts, state: str, detail: str, now: datetime) -> RunState:
    epochs, log_seconds = _pace(paths) or (0, None)
    log_age = _age(paths.train_log)
    booting = job is not None and job.state == "CONFIGURING"  # which takes a node in a cloud many minutes
    if state == "running" and log_seconds is not None and not booting:
        silent = _silence(paths, job, log_age, now)
        if silent is not None and silent > max(HUNG_SECONDS, HUNG_INTERVALS * log_seconds):
            state, detail = "hung", f"no log line for {waiting.rough(silent)}, {detail}"
    epoch = int(facts.last_row.get("epoch", 0))
    progress = last_progress(paths.train_log) if state in AT_WORK else None
    if progress is not None and progress.epoch != epoch + 1:
        progress = None  # of an epoch that is over, or of a start whose rows were cut off
    start = waiting.start_of(job) if job is not None and state in WAITING else None
    return RunState(
        run=paths.name,
        state=state,
        detail=detail,
        epoch=epoch,
        epochs=epochs,
        test_accuracy=facts.last_row.get("test_accuracy"),
        best_accuracy=facts.best_accuracy,
        images_per_second=progress.images_per_second if progress else facts.last_row.get("images_per_second"),
        eta_seconds=None
        if state in (*ENDED, "hung", UNKNOWN)
        else seconds_left(paths, epoch, epochs, facts, progress, start, now),
        restarts=max(0, facts.starts - 1),
        requeues=facts.requeues,
        world_size=facts.world_size,
        job_id=job.job_id if job else facts.job_id,
        log_age_seconds=log_age,
        reason=waiting.reason_code(job) if job is not None and state in WAITING else None,
        start_time=start.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z") if start else None,
        epoch_progress=min(1.0, progress.step / max(1, progress.steps)) if progress else None,
        restart_causes=facts.causes,
        lost_seconds=round(facts.lost_seconds, 3),
    )


def _pace(paths: RunPaths) -> tuple[int, float] | None:
    """train.epochs and train.log_seconds; None where there is no readable spec.

    The spec was checked as a whole when it was frozen: for these two its YAML need not be parsed again, which would
    take a hundred times as long.
    """
    try:
        with os.fdopen(open_regular(paths.spec), "rb") as file:
            found = _PACE.match(file.read(PACE_BYTES))
    except OSError:
        found = None
    if found is not None:
        return int(found[1]), float(found[2])
    try:
        spec = read_frozen(paths)
    except UserError:
        return None
    return (spec.train.epochs, spec.train.log_seconds) if spec else None


def _age(path: Path) -> float | None:
    """Seconds since a file was last written; None where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        if path.exists():  # which raises, too, where it cannot be told
            raise
        return None


def _silence(paths: RunPaths, job: QueuedJob | None, log_age: float | None, now: datetime) -> float | None:
    """For how long this start has said nothing: the log's last line may be of an earlier one, hours ago."""
    start = waiting.start_of(job) if job is not None else None
    begun = (now - start).total_seconds() if start is not None else _age(paths.lock)
    ages = [age for age in (log_age, begun) if age is not None]
    return min(ages, default=None)


def _busy(
    paths: RunPaths, job: QueuedJob | None, last_word: Mapping[str, Any], submitted: Mapping[str, Any], now: datetime
) -> tuple[str, str] | None:
    """(state, detail) of a run that has a job or processes; None for any other."""
    if job is not None:
        return in_the_queue(job, last_word, now)
    owner = runlock.holder(paths.lock)
    if owner is not None:
        return "running", f"on {owner.get('host', '?')}"
    return ("running", "starting on this machine") if controller_of(paths, submitted) is not None else None


def _without_a_job(facts: Facts, slurm_answers: bool, asked_at: float | None) -> tuple[str, str]:
    word = facts.last_word
    if not word:
        return "not started", "never submitted"
    if facts.submitted.get("scheduler") == "slurm" and word["event"] not in ("finished", "cancelled"):
        if not slurm_answers:
            return UNKNOWN, "Slurm does not answer"
        heard_at = instant_of(word)
        news = asked_at is not None and heard_at is not None and heard_at.timestamp() > asked_at - CLOCKS_DIFFER
        if news and not told_its_end(word):
            return UNKNOWN, f"{'submitted' if word['event'] == 'submitted' else 'heard of'} since Slurm last answered"
    return afterwards(word)
