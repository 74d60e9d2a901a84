"""What a run is doing right now, read from its logs, its lock and the queue."""

from __future__ import annotations

import itertools
import time
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cifar_hpc import runlock
from cifar_hpc.checks import local_controller
from cifar_hpc.errors import UserError
from cifar_hpc.freeze import read_frozen
from cifar_hpc.paths import RunPaths
from cifar_hpc.preemption import ALIVE
from cifar_hpc.runlog import count_requeues, count_starts, read_jsonl
from cifar_hpc.slurm import QueuedJob

# A log that has been silent for this many of its intervals (and at least this many seconds) is a hung run.
HUNG_INTERVALS, HUNG_SECONDS = 10, 300
ENDED = ("finished", "failed", "cancelled", "stopped", "not started", "unreadable")


@dataclass(frozen=True)
class RunState:
    """One run. `state` is queued, requeued, running, hung, stopping, or one of ENDED."""

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

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more unless somebody submits again."""
        return self.state in ENDED

    def plain(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def read_state(paths: RunPaths, jobs: Mapping[str, QueuedJob]) -> RunState:
    """The state of one run; `unreadable` where its files are damaged or not of this project.

    Args:
        jobs: as `slurm.queue` returns them.
    """
    try:
        return _checked(_read_state(paths, jobs))
    except (
        UserError,
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        detail = f"its files make no sense ({type(error).__name__}: {error})"
        return RunState(paths.name, "unreadable", detail, 0, 0, None, None, None, None, 0)


def _checked(state: RunState) -> RunState:
    numbers = (state.test_accuracy, state.best_accuracy, state.images_per_second, state.world_size)
    if all(isinstance(n, (int, float, types.NoneType)) for n in numbers) and isinstance(state.job_id or "", str):
        return state
    raise ValueError("text where a number should be, or a number where text should be")


def _read_state(paths: RunPaths, jobs: Mapping[str, QueuedJob]) -> RunState:
    events, rows = read_jsonl(paths.events), read_jsonl(paths.metrics)
    try:
        spec = read_frozen(paths)
    except UserError:
        spec = None
    epochs = spec.train.epochs if spec else 0
    log_age = time.time() - paths.train_log.stat().st_mtime if paths.train_log.exists() else None
    job = jobs.get(paths.name)
    state, detail = _state(paths, events, job)
    if state == "running" and spec is not None and log_age is not None:
        limit = max(HUNG_SECONDS, HUNG_INTERVALS * spec.train.log_seconds)
        if log_age > limit:
            state, detail = "hung", f"no log line for {log_age / 60:.0f} min"
    last = rows[-1] if rows else {}
    epoch = int(last.get("epoch", 0))
    seconds = [float(r["epoch_seconds"]) for r in rows[-5:] if "epoch_seconds" in r]
    eta = (epochs - epoch) * sum(seconds) / len(seconds) if seconds and state not in ENDED else None
    starts = [e for e in events if e.get("event") in ("started", "resumed")]
    return RunState(
        run=paths.name,
        state=state,
        detail=detail,
        epoch=epoch,
        epochs=epochs,
        test_accuracy=last.get("test_accuracy"),
        best_accuracy=max((r["test_accuracy"] for r in rows if "test_accuracy" in r), default=None),
        images_per_second=last.get("images_per_second"),
        eta_seconds=eta,
        restarts=max(0, count_starts(events) - 1),
        requeues=count_requeues(events),
        world_size=starts[-1].get("world_size") if starts else None,
        job_id=job.job_id if job else next((e["job_id"] for e in reversed(events) if e.get("job_id")), None),
        log_age_seconds=log_age,
    )


def _state(paths: RunPaths, events: list[dict[str, Any]], job: QueuedJob | None) -> tuple[str, str]:
    if job is not None:
        if job.state == "PENDING":
            start = f", start {job.start}" if job.start not in ("", "N/A") else ""
            return ("requeued" if job.reason == "BeginTime" else "queued"), f"{job.reason}{start}"
        if job.state in (*ALIVE, "CONFIGURING"):
            return "running", f"on {job.nodes}"
        return "stopping", job.state
    owner = runlock.holder(paths.lock)
    if owner is not None:
        return "running", f"on {owner.get('host', '?')}"
    if local_controller(paths) is not None:
        return "running", "starting on this machine"
    known = [e for e in events if e.get("event") in ("finished", "failed", "hang", "left", "cancelled", *_SUBMIT_AGAIN)]
    if not known:
        return "not started", "never submitted"
    # A cancelled job still writes what it does about it; that is no news, unless it started again or finished.
    since_start = list(itertools.takewhile(lambda e: e["event"] not in ("submitted", "resumed"), reversed(known)))
    cancelled = [e for e in since_start if e["event"] == "cancelled"]
    return _afterwards(cancelled[0] if cancelled and known[-1]["event"] != "finished" else known[-1])


def _afterwards(event: dict[str, Any]) -> tuple[str, str]:
    """How things stand once the job is gone, from the last event that says something about it."""
    name = event["event"]
    if name == "finished":
        return "finished", f"{event.get('test_accuracy', float('nan')):.2f}%"
    if name in ("failed", "hang"):
        return "failed", str(event.get("error", ""))
    if name == "cancelled":
        return "cancelled", f"by {event.get('by', '?')}"
    if name == "left":
        return ("cancelled" if event.get("reason") == "ended" else "stopped"), str(event.get("explanation", ""))
    return "stopped", f"{_SUBMIT_AGAIN[name]}; submit again to go on"


_SUBMIT_AGAIN = {
    "submitted": "its job is gone from the queue",
    "started": "it ended without a word (killed?)",
    "resumed": "it ended without a word (killed?)",
    "checkpoint": "it ended without a word (killed?)",
    "requeued": "its requeued job is gone from the queue",
    "holding": "Slurm ended the job",
}
