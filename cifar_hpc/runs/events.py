"""events.jsonl: one row an event. The dataclasses name the events and the fields of their rows."""

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, dataclass_transform

from cifar_hpc.runs.logs import append_line, utc_now

STATES: dict[str, str] = {}  # state of a run after its last event; an event that is not here says nothing about it


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Event:
    """Base of all events, which are dataclasses. A field that has a default is left out of the row if it is None."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str, state: str | None = None) -> None:
        cls.name = name
        if state is not None:
            STATES[name] = state
        dataclass(kw_only=True)(cls)  # frozen for type checkers alone: making it so takes time


class Submitted(Event, name="submitted", state="queued"):
    """A job was queued, or started on this machine, by `user`; `sweep` is the folder of a sweep's submission.

    cluster: Slurm's name of it.
    """

    scheduler: str
    code: str
    command: str
    sweep: str | None = None
    user: str | None = None
    cluster: str | None = None


class Attempted(Event, name="attempt", state="running"):
    """A job has started: its batch script writes this before anything can fail (launch/batch_script)."""

    restart_count: int
    nodes: str


class Started(Event, name="started", state="running"):
    """An attempt found no checkpoint and begins at step 0."""

    step: int
    epoch: int
    step_in_epoch: int
    file: str | None
    metrics_cut: int
    environment: dict[str, Any]
    environment_changed: dict[str, Any]
    shards: int | None
    machine: dict[str, Any]
    hosts: list[str]
    command: str | None
    startup: dict[str, float]


class Resumed(Started, name="resumed", state="running"):
    """An attempt continues from a checkpoint."""


class FirstStep(Event, name="first_step"):
    """The first step of an attempt is done."""

    step: int
    startup: dict[str, float]


class Evaluated(Event, name="evaluated"):
    """An epoch is complete."""

    epoch: int
    step: int
    test_accuracy: float
    test_loss: float


class Checkpoint(Event, name="checkpoint", state="running"):
    """A checkpoint is on disk, complete and synced."""

    file: str
    step: int
    epoch: int
    step_in_epoch: int
    bytes: int


class CheckpointFailed(Event, name="checkpoint_failed"):
    """A checkpoint could not be written; training continues."""

    file: str
    reason: str


class Fallback(Event, name="fallback"):
    """A damaged checkpoint was moved aside, and an older one is used; `restored_from` is of best.pt alone."""

    file: str
    moved_to: str | None
    reason: str
    restored_from: str | None


class Mended(Fallback, name="mended"):
    """best.pt was missing or old, and was restored."""


class Signal(Event, name="signal"):
    """The attempt stopped on a signal; `seconds` from the signal to the state on disk."""

    signal: str
    seconds: float | None
    step: int | None = None
    epoch: int | None = None


class Requeued(Event, name="requeued", state="requeued"):
    """Slurm, or the local executor, is asked for another attempt."""

    reason: str
    delay_seconds: int | None = None
    explanation: str | None = None


class RequeueRequested(Event, name="requeue_requested"):
    """A user asks for a requeue: written before the signal for it is sent."""

    by: str


class RequeueFailed(Event, name="requeue_failed", state="stopped"):
    """Slurm refused to requeue the job."""

    reason: str


class Holding(Event, name="holding", state="stopping"):
    """Slurm does not answer: the process waits until Slurm ends it."""

    reason: str
    explanation: str


class Left(Event, name="left", state="stopped"):
    """The attempt ended without a requeue, as intended."""

    reason: str
    explanation: str


class Cancelled(Event, name="cancelled", state="cancelled"):
    """A user cancelled the run."""

    by: str


class Failed(Event, name="failed", state="failed"):
    """The attempt failed; `again` says whether another one was requested, `bad_node` which node's fault it was."""

    step: int
    error: str
    cause: str
    rank: int | None = None
    rank_host: str | None = None
    again: bool
    bad_node: str | None = None


class Hang(Failed, name="hang", state="failed"):
    """No rank made progress for train.watchdog_minutes."""


class Finished(Event, name="finished", state="finished"):
    """The state after the last epoch is on disk."""

    step: int
    epoch: int
    test_accuracy: float
    best: dict[str, Any]


STARTS = (Started.name, Resumed.name)
FAILURES = (Failed.name, Hang.name)
BY_SLURM = ("preemption", "requeued")  # reasons of Left with which Slurm has requeued the job


def append_event(path: Path, event: Event, *, job_id: str | None, restart: int | None, world_size: int | None) -> None:
    """Append one row to events.jsonl."""
    head = {"time": utc_now(), "event": event.name, "host": socket.gethostname()}
    sender = {"job_id": job_id, "restart": restart, "world_size": world_size}
    values = {key: v for key, v in vars(event).items() if v is not None or not hasattr(type(event), key)}
    append_line(path, json.dumps({**head, **sender, **values}))
