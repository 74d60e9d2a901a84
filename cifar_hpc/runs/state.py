"""Current state of a run: from progress.json, its lock and the queue."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc.errors import without_class
from cifar_hpc.runs import events
from cifar_hpc.runs.events import FAILURES, Cancelled, Failed, Finished, Hang, Holding, Left, Requeued, Submitted
from cifar_hpc.runs.history import History, time_of
from cifar_hpc.runs.lock import controller_of, holder, waits_here
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import DAMAGE, Progress, read_progress
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import HIDDEN, ON_CLUSTER, QueuedJob
from cifar_hpc.text import duration

# A log that has been silent for this many of its intervals (and at least this many seconds) is a hung run.
HUNG_INTERVALS, HUNG_SECONDS = 10, 300
WAITING = ("queued", "requeued")
AT_WORK = ("running", "hung", "suspended", "stopping")
ENDED = ("finished", "failed", "cancelled", "stopped", "not started", "unreadable")
UNKNOWN = "unknown"
# Time in which a run that was heard of is not gone because one answer of Slurm lacks it: the clock of the machine that
# wrote the event may differ, and a slurmctld that has just been restarted may not know all jobs yet.
RECENT_SECONDS = 30.0
_REQUEUED = {
    **{"preemption": "preempted", "requested": "requeued on request", "requeued": "requeued by Slurm or a person"},
    **{"signal": "after a signal", "timeout": "at its time limit", "failure": "after a failure"},
}
# By the last event: why Slurm ends a job, ...
_STOPPING = {
    Finished.name: "the run has finished",
    Requeued.name: "to be requeued",
    Failed.name: "the run has failed",
    Hang.name: "the run has failed",
    Cancelled.name: "it was cancelled",
}
# ... and how a run ended whose last event is no end.
_NO_END = {
    Submitted.name: "its job is gone from the queue",
    Requeued.name: "its requeued job is gone from the queue",
    events.RequeueFailed.name: "Slurm refused to requeue its job",
    Holding.name: "Slurm ended the job",
}


@dataclass(frozen=True)
class RunState:
    """One run, as `status --json` shows it (`plain`)."""

    run: str
    state: str
    detail: str
    epoch: int = 0
    epochs: int = 0
    test_accuracy: float | None = None
    best_accuracy: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    restarts: int = 0
    requeues: dict[str, int] = field(default_factory=dict)
    world_size: int | None = None
    job_id: str | None = None
    log_age_seconds: float | None = None
    reason: str | None = None
    start_time: str | None = None
    epoch_progress: float | None = None
    restart_causes: dict[str, int] = field(default_factory=dict)
    lost_seconds: float = 0.0
    user: str | None = None
    position: float | None = None
    changed: dict[str, Any] | None = None
    sweep: str | None = None
    owner: str | None = None

    @property
    def ended(self) -> bool:
        """True if the run is over until it is submitted again."""
        return self.state in ENDED

    def plain(self) -> dict[str, Any]:
        """One object of the list that `status --json` prints. Keys are only ever added; all are always there.

        run: str, the run's name.
        state: queued, requeued (waiting after a requeue for the time from which it may start), running, hung (no line
            in its log for much longer than train.log_seconds), suspended (by Slurm), stopping (Slurm ends the job),
            finished, failed, cancelled, stopped (ended otherwise; submitted again, it goes on), not started (never
            submitted), unreadable (its files make no sense or cannot be read, and it has no job), or unknown (Slurm
            does not answer, does not show another user's job, or knows no job of a run that was heard of just now).
        detail: str, why, for people; its wording may change.
        epoch, epochs: int, finished ones and those of the spec.
        test_accuracy, best_accuracy: float or null, %, of the last finished epoch and the best one.
        images_per_second: float or null, training images, at the last line of progress or over the last finished epoch.
        eta_seconds: float or null, until the end (`Progress.estimate`); null where it has ended, hangs, or is unknown.
        restarts: int, starts after the first, also those that failed before training.
        requeues: {cause: int}, requeues that the run asked for itself: preemption, timeout, failure.
        world_size: int or null, ranks of the last start.
        job_id: str or null, of the job in the queue, else of the last one.
        log_age_seconds: float or null, since the last line of train.log.
        reason: str or null, Slurm's own code of why the job waits, such as Priority.
        start_time: str or null, ISO 8601 in UTC: when Slurm expects to start a waiting job; of a requeued one, the time
            before which it does not start.
        epoch_progress: float or null, the part of the epoch after the finished ones that is done, 0 to 1.
        restart_causes: {cause: int}, all restarts: preemption, timeout, failure, killed (without a warning), submitted
            (again, by a person). Unlike `requeues` it has those that Slurm saw to itself.
        lost_seconds: float, what the restarts have cost, but those after submitting again (`History.lost_seconds`).
        user: str or null, who submitted it last.
        position: float or null, epochs done: of a run at work now, of any other at its newest checkpoint, from which
            the next start goes on; null where its files cannot be read.
        changed: {dotted key: value} or null, the keys that change the result and differ from the defaults.
        sweep: str or null, name of the sweep that it was submitted with last.
        owner: str or null, of an unknown run: whose job it may have, of another user or on another cluster.
        """
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}


def read_state(paths: RunPaths, jobs: Mapping[str, QueuedJob | None] | None, asked_at: float | None = None) -> RunState:
    """State of one run; if its files are damaged or not of this project, from its job or lock alone.

    Args:
        jobs: as `queue` and `look_again` return them; None where Slurm does not answer.
        asked_at: when Slurm was asked for `jobs`, in seconds since the epoch: of a run that was heard of since then
            they cannot tell that it has no job.
    """
    job = jobs.get(paths.name) if jobs is not None else None
    now = datetime.now(UTC)
    try:
        progress = read_progress(paths)
        history = progress.history
        state, detail = _busy(paths, job, history, now, asked_at) or _without_a_job(paths.name, jobs, history, asked_at)
        return _state_of(paths, job, progress, state, detail, now)
    except OSError as error:
        trouble = f"its files cannot be read now ({error.strerror or error})"
    except DAMAGE as error:
        trouble = f"its files make no sense ({type(error).__name__}: {error})"
    state, detail = "unreadable", trouble
    with contextlib.suppress(*DAMAGE):
        if busy := _busy(paths, job, History(), now):
            state, detail = busy[0], f"{busy[1]}; {trouble}"
    return RunState(paths.name, state, detail, job_id=job.job_id if job else None)


def _state_of(
    paths: RunPaths, job: QueuedJob | None, progress: Progress, state: str, detail: str, now: datetime
) -> RunState:
    history, summary, log_age = progress.history, progress.summary, _age(paths.train_log)
    booting = job is not None and job.state == "CONFIGURING"  # which takes a node in a cloud many minutes
    if state == "running" and progress.log_seconds is not None and not booting:
        # The last line may be of an earlier attempt, hours ago.
        begun = (now - job.start_time).total_seconds() if job and job.start_time else _age(paths.lock)
        silent = min((age for age in (log_age, begun) if age is not None), default=0.0)
        if silent > max(HUNG_SECONDS, HUNG_INTERVALS * progress.log_seconds):
            state, detail = "hung", f"no log line for {duration(silent)}, {detail}"
    if state == "running" and progress.doing:
        detail = f"{detail}: {progress.doing}"
    waiting = job if state in WAITING else None
    start = waiting.start_time if waiting else None
    eta = None if state in (*ENDED, "hung", UNKNOWN) else progress.eta_seconds
    if eta is not None and start is not None:
        eta += max(0.0, (start - now).total_seconds())
    part = progress.epoch - summary.epoch
    saved, position = progress.saved_epoch, float(summary.epoch)
    if state in AT_WORK:
        position += part if 0 < part <= 1 else 0.0  # else of rows that were cut off again
    elif state == "finished":
        position = float(history.state.get("epoch") or summary.epoch)
    elif saved is not None:
        position = saved
    world_size = history.attempts[-1].world_size if history.attempts else None
    job_id, submitted = job.job_id if job else history.job_id, history.last_of(Submitted)
    texts = (job_id, user := submitted.get("user"), sweep := submitted.get("sweep"))
    if not (isinstance(world_size, int | None) and all(isinstance(text, str | None) for text in texts)):
        raise ValueError("text where a number should be, or a number where text should be")
    return RunState(
        run=paths.name,
        state=state,
        detail=detail,
        epoch=summary.epoch,
        epochs=progress.epochs,
        test_accuracy=summary.test_accuracy,
        best_accuracy=summary.best_accuracy,
        images_per_second=progress.images_per_second,
        eta_seconds=eta,
        restarts=max(0, len(history.attempts) - 1),
        requeues=history.requeues,
        world_size=world_size,
        job_id=job_id,
        log_age_seconds=log_age,
        reason=waiting.reason_code if waiting else None,
        start_time=start.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z") if start else None,
        epoch_progress=position - summary.epoch if 0 < position - summary.epoch <= 1 else None,
        restart_causes=history.restart_causes,
        lost_seconds=round(history.lost_seconds, 3),
        user=user,
        position=position,
        changed=progress.changed,
        sweep=Path(sweep).parent.name if sweep else None,
        owner=_owner_elsewhere(submitted) or None if state == UNKNOWN else None,
    )


def _age(path: Path) -> float | None:
    """Seconds since a file was last written; None if there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        if path.exists():  # which raises, too, if that is unknown
            raise
        return None


def _busy(
    paths: RunPaths, job: QueuedJob | None, history: History, now: datetime, asked_at: float | None = None
) -> tuple[str, str] | None:
    """(state, detail) of a run that has a job or processes; None for any other."""
    if job is not None and job.state in ALIVE and asked_at is not None:
        last = history.state
        if last.get("event") == Requeued.name and (time_of(last) or 0.0) > asked_at:
            return "requeued", _REQUEUED.get(str(last.get("reason")), "")
    if job is not None:
        state, detail = _in_the_queue(job, history.state, now)
        return state, f"{job.user}'s job: {detail}" if job.user else detail
    owner = holder(paths.lock)
    if owner is not None:
        return "running", f"on {owner.get('host', '?')}"
    if controller_of(paths, history) is not None:
        over = history.state.get("event") in (Finished.name, Cancelled.name, *FAILURES)
        return "running", f"{'ending' if over else 'starting'} on this machine"
    here = history.last_of(Submitted).get("scheduler") != "slurm" and history.state.get("event") != Finished.name
    if here and waits_here(paths, history):
        return "queued", "waits for its turn on this machine"
    return None


def _in_the_queue(job: QueuedJob, last: Mapping[str, Any], now: datetime) -> tuple[str, str]:
    """(state, detail) of a run that has a job; `last` is `History.state`."""
    if job.state == HIDDEN:
        return UNKNOWN, f"maybe queued as job {job.job_id}, which Slurm does not show here"
    name, start = str(last.get("event")), job.start_time
    if job.held and name in FAILURES:
        return "queued", f"held after a failure, until the command requeue releases it: {_failure(last)}"
    if job.waits and job.reason != "BeginTime":
        return "queued", ", ".join(filter(None, (job.why, expected(start, now))))
    begin = clock(start, now) if start is not None else None
    if job.waits and name == Submitted.name:
        return "queued", f"BeginTime: not before {begin}" if begin else "BeginTime: waits for its begin time"
    if job.waits:
        cause = _REQUEUED.get(str(last.get("reason"))) if name in (Requeued.name, Left.name) else None
        until = f"until {begin}" if begin else "waits for its begin time"
        return "requeued", ", ".join(filter(None, (until, cause)))
    if job.state in (*ALIVE, "CONFIGURING"):
        return "running", f"on {job.nodes}"
    if job.state == "SUSPENDED":
        return "suspended", f"by Slurm, on {job.nodes}"
    return "stopping", f"{job.state}: {_STOPPING.get(name, 'Slurm ends the job')}"


def expected(start: datetime | None, now: datetime) -> str:
    """`starts in ~12m`, or nothing where that is not known or has passed. Slurm plans by the time limits of what
    runs, so that jobs often start earlier; and later where others come that go first."""
    seconds = 0.0 if start is None else (start - now).total_seconds()
    return f"starts in ~{duration(seconds)}" if seconds > 0 else ""


def clock(instant: datetime, now: datetime) -> str:
    """Local time such as `14:05:30`, with its date unless that is today's."""
    local = instant.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == now.astimezone().date() else f"{local:%Y-%m-%d %H:%M:%S}"


def _owner_elsewhere(submitted: Mapping[str, Any]) -> str:
    """The owner, by the event of the submission, of a job of another user or on another cluster; else empty."""
    user, cluster = submitted.get("user"), submitted.get("cluster")
    if cluster and client.cluster_name() not in ("", cluster):
        return f"{user}{ON_CLUSTER}{cluster}"
    return user if user and user != client.user_name() else ""


def _without_a_job(
    run: str, jobs: Mapping[str, QueuedJob | None] | None, history: History, asked_at: float | None
) -> tuple[str, str]:
    """(state, detail) of a run that has neither a job nor processes."""
    last = history.state
    if not last:
        return "not started", "never submitted"
    name, reason, submitted = last["event"], last.get("reason"), history.last_of(Submitted)
    if submitted.get("scheduler") == "slurm" and name not in (Finished.name, Cancelled.name):
        if jobs is None:
            return UNKNOWN, "Slurm does not answer"
        gone = run in jobs  # Slurm was asked for the recorded job by its id
        # By a failure or by leaving the run itself says that it ended, but for a job that Slurm has requeued.
        ended = name in FAILURES or (name == Left.name and reason not in events.BY_SLURM)
        if not (gone or ended) and (owner := _owner_elsewhere(submitted)):
            return UNKNOWN, f"maybe queued as job {history.job_id} of {owner}"
        heard_at = time_of(last)
        news = asked_at is not None and heard_at is not None and heard_at > asked_at - RECENT_SECONDS
        if news and not (gone or ended or name == Left.name):
            what = "submitted" if name == Submitted.name else "heard of"
            return UNKNOWN, f"{what} a moment ago, and Slurm does not know its job"
    match name:
        case Finished.name:
            return "finished", f"{duration(max(0.0, time.time() - ended))} ago" if (ended := time_of(last)) else ""
        case Failed.name | Hang.name:
            return "failed", _failure(last)
        case Cancelled.name:
            return "cancelled", f"by {last.get('by', '?')}"
        case Left.name if reason == "ended":
            return "cancelled", "by scancel, or its node was lost"
        case Left.name:
            return "stopped", str(last.get("explanation", ""))
    return "stopped", f"{_NO_END.get(name, 'killed? it ended without a word')}; submit again to go on"


def _failure(event: Mapping[str, Any]) -> str:
    """Reason of a failure, without the names of this project's own exceptions."""
    words = without_class(str(event.get("error", "")))
    if event["event"] == Hang.name:
        return f"hung: {words}"
    known = event.get("cause") == "out_of_memory" and "out of memory" not in words.lower()
    return f"out of memory: {words}" if known else words
