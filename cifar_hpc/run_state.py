"""What a run is doing right now, read from its logs, its lock and the queue."""

from __future__ import annotations

import os
import re
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_hpc import runlock
from cifar_hpc.checks import controller_of
from cifar_hpc.errors import UserError
from cifar_hpc.freeze import read_frozen
from cifar_hpc.jsonfile import open_regular
from cifar_hpc.paths import RunPaths
from cifar_hpc.preemption import ALIVE
from cifar_hpc.run_facts import Facts, read_facts
from cifar_hpc.slurm import QueuedJob

# A log that has been silent for this many of its intervals (and at least this many seconds) is a hung run.
HUNG_INTERVALS, HUNG_SECONDS = 10, 300
# epochs and log_seconds of a spec as `freeze` writes it.
_PACE = re.compile(
    rb"# The frozen spec of run [^\n]*\n(?:[^\n]*\n)*?train:\n"
    rb"(?:  [^\n]*\n)*?  epochs: ([0-9]+)\n(?:  [^\n]*\n)*?  log_seconds: ([0-9]+\.[0-9]+)\n"
)
PACE_BYTES = 64 * 1024
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
        return dict(vars(self))


def read_state(
    paths: RunPaths, jobs: Mapping[str, QueuedJob], facts_of: Callable[[RunPaths], Facts] = read_facts
) -> RunState:
    """The state of one run; `unreadable` where its files are damaged or not of this project.

    Args:
        jobs: as `slurm.queue` returns them.
        facts_of: where the facts of the logs come from.
    """
    try:
        return _checked(_state_of(paths, jobs.get(paths.name), facts_of(paths)))
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


def _state_of(paths: RunPaths, job: QueuedJob | None, facts: Facts) -> RunState:
    epochs, log_seconds = _pace(paths) or (0, None)
    log_age = _age(paths.train_log)
    state, detail = _state(paths, facts, job)
    if state == "running" and log_seconds is not None and log_age is not None:
        limit = max(HUNG_SECONDS, HUNG_INTERVALS * log_seconds)
        if log_age > limit:
            state, detail = "hung", f"no log line for {log_age / 60:.0f} min"
    epoch = int(facts.last_row.get("epoch", 0))
    seconds = [float(s) for s in facts.epoch_seconds]
    eta = (epochs - epoch) * sum(seconds) / len(seconds) if seconds and state not in ENDED else None
    return RunState(
        run=paths.name,
        state=state,
        detail=detail,
        epoch=epoch,
        epochs=epochs,
        test_accuracy=facts.last_row.get("test_accuracy"),
        best_accuracy=facts.best_accuracy,
        images_per_second=facts.last_row.get("images_per_second"),
        eta_seconds=eta,
        restarts=max(0, facts.starts - 1),
        requeues=facts.requeues,
        world_size=facts.world_size,
        job_id=job.job_id if job else facts.job_id,
        log_age_seconds=log_age,
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


def _state(paths: RunPaths, facts: Facts, job: QueuedJob | None) -> tuple[str, str]:
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
    if controller_of(paths, facts.submitted) is not None:
        return "running", "starting on this machine"
    return _afterwards(facts.last_word) if facts.last_word else ("not started", "never submitted")


def _afterwards(event: Mapping[str, Any]) -> tuple[str, str]:
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
