"""progress.json: the position of a run and a summary of its logs, in one file that programs and `status` read.

It holds nothing that events.jsonl, metrics.jsonl and the spec do not, and is made from them where it is missing. It has
the sizes of the logs that it was made from: a reader adds what was appended since, and reads a spec that has changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_hpc.config.io import changed_keys
from cifar_hpc.config.schedule import epochs_left, resizes, training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import UserError
from cifar_hpc.files import NotRegularError, open_regular, read_regular, write_atomic
from cifar_hpc.runs import events
from cifar_hpc.runs.events import STATES, Event, append_event
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import Attempt, History, number_of
from cifar_hpc.runs.logs import parse_jsonl, utc_now
from cifar_hpc.runs.paths import RunPaths

FORMAT = 2
# Errors from files that are damaged, or not of this project.
DAMAGE = (UserError, OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
CIFAR_IMAGES = 50_000  # to train on
RECENT_EPOCHS = 5  # from which the time left is estimated
# An hour without a restart is assumed before anything has been measured.
PRIOR_UP_SECONDS = 3600.0
_POSITION = (
    *("epochs", "log_seconds", "step", "epoch", "loss", "accuracy", "lr", "images_per_second", "eta_seconds"),
    "peak_memory_bytes",
)
_SIZES = ("events_bytes", "metrics_bytes", "spec_mtime_ns")  # of the files that it was made from
_lock = threading.Lock()  # checkpoints are reported from a thread of their own


@dataclass
class EpochSummary:
    """Summary of metrics.jsonl: the last row, the best test accuracy, and the time of recent epochs.

    epoch_seconds: of those of the last RECENT_EPOCHS rows that were trained by as many ranks as the last one.
    """

    epoch: int = 0
    step: int = 0
    train_loss: float | None = None
    train_accuracy: float | None = None
    lr: float | None = None
    test_accuracy: float | None = None
    best_accuracy: float | None = None
    images_per_second: float | None = None
    epoch_seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> EpochSummary:
        """Sum up the rows.

        Raises:
            TypeError, ValueError, OverflowError: a value is no number.
        """
        if not rows:
            return cls()
        last, recent = rows[-1], rows[-RECENT_EPOCHS:]
        of_last = ("train_loss", "train_accuracy", "lr", "test_accuracy", "images_per_second")
        same = [row for row in recent if row.get("world_size") == last.get("world_size")]
        return cls(
            epoch=int(last.get("epoch", 0)),
            step=int(last.get("step", 0)),
            **{key: float(last[key]) for key in of_last if last.get(key) is not None},
            best_accuracy=max((float(row["test_accuracy"]) for row in rows if "test_accuracy" in row), default=None),
            epoch_seconds=[float(row["epoch_seconds"]) for row in same if "epoch_seconds" in row],
        )


@dataclass
class Progress:
    """Position of a run.

    epochs, log_seconds: of its spec; 0 and None where that cannot be read.
    step, epoch: done so far, epochs with the part of the one in progress.
    loss, accuracy, lr: of training, over that epoch so far or the last one.
    images_per_second: at the last line of progress, or over the last epoch.
    eta_seconds: to the end of the run, without waiting for its next start.
    peak_memory_bytes: by rank; of the device, or of the process on a CPU.
    changed: values by dotted key that differ from the defaults and change the result; None where that is not known.
    doing: a part of a start that takes its time; None during training, and after any event.
    """

    epochs: int = 0
    log_seconds: float | None = None
    step: int = 0
    epoch: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    lr: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    changed: dict[str, Any] | None = None
    doing: str | None = None
    history: History = field(default_factory=History)
    events_bytes: int = 0
    summary: EpochSummary = field(default_factory=EpochSummary)
    metrics_bytes: int = 0
    spec_mtime_ns: int = 0

    def add_events(self, path: Path) -> None:
        """Add what was appended to events.jsonl; read all of it where it was replaced or cut."""
        content, begin = _news(path, self.events_bytes), self.events_bytes
        if content is None:
            return
        if begin and not content.startswith(b"\n"):
            self.history, begin, content = History(), 0, _news(path, 0) or b""
        content = content[begin > 0 : content.rfind(b"\n") + 1]
        for row in parse_jsonl(content):
            self.history.add(row)
            self.doing = None
        self.events_bytes = begin + len(content)

    def add_metrics(self, path: Path) -> None:
        """Read metrics.jsonl where it has changed: rows may have been cut off."""
        if _news(path, self.metrics_bytes) is None:
            return
        content = _news(path, 0) or b""
        last = self.summary = EpochSummary.of(parse_jsonl(content))
        self.metrics_bytes = len(content)
        if last.epoch >= self.epoch:
            self.step, self.epoch = last.step, float(last.epoch)
            self.loss, self.accuracy, self.lr = last.train_loss, last.train_accuracy, last.lr
            self.images_per_second = last.images_per_second

    def estimate(self, spec: Spec, eta_by_rate: float | None = None) -> None:
        """Set the time left:

            epochs left x seconds an epoch x (1 + lost / (up + PRIOR_UP_SECONDS))

        seconds an epoch: the median of the last few, evaluation included; where the images grow, of the last one, for
            as many pixels.
        lost, up: seconds that restarts have cost so far, and that the run was up: preemptions are assumed to go on as
            often and at the same cost.

        Args:
            eta_by_rate: seconds left at the current rate; used before the first epoch has been measured.
        """
        self.epochs, self.log_seconds = spec.train.epochs, spec.train.log_seconds
        self._take_checkpoint(spec)
        seconds = self.summary.epoch_seconds
        if seconds and resizes(spec):
            epoch = self.summary.epoch
            growth = training_size(spec, epoch) / training_size(spec, epoch - 1)
            work = epochs_left(spec, self.epoch) * seconds[-1] * growth**2
        elif seconds:
            from statistics import median  # 3 ms of each start of status, which a finished run does not need

            work = max(0.0, self.epochs - self.epoch) * median(seconds)
        elif eta_by_rate is not None:
            work = eta_by_rate
        else:
            return
        restarts = self.history.lost_seconds / (self.history.up_seconds + PRIOR_UP_SECONDS)
        self.eta_seconds = work * (1 + restarts)

    def _take_checkpoint(self, spec: Spec) -> None:
        """Take the position from the newest checkpoint, if none is known and the spec tells the size of an epoch."""
        saved = self.history.last_of(events.Checkpoint)
        cifar = spec.data.source.startswith("cifar") and not spec.data.in_root
        images = spec.data.train_size or (CIFAR_IMAGES if cifar else 0)
        steps = math.ceil((images - (spec.data.holdout or 0)) / spec.train.batch_size)
        step, epoch, done = (number_of(saved, key) for key in ("step", "epoch", "step_in_epoch"))
        if self.step == 0 and steps > 0 and step and epoch is not None and done is not None:
            self.step, self.epoch = int(step), epoch + done / steps

    @property
    def saved_epoch(self) -> float | None:
        """Epochs done at the newest checkpoint, from which the next start goes on; None without a checkpoint."""
        step = self.history.last_of(events.Checkpoint).get("step")
        epoch, steps = (self.summary.epoch, self.summary.step) if self.summary.step else (self.epoch, self.step)
        return step * epoch / steps if isinstance(step, int) and steps else None

    def plain(self) -> dict[str, Any]:
        """The object in progress.json."""
        history, summary, saved = self.history, self.summary, self.history.last_of(events.Checkpoint)
        shown = {
            "format": FORMAT,
            "state": STATES[history.state["event"]] if history.state else "not started",
            **{key: getattr(self, key) for key in (*_POSITION, "doing")},
            "test_accuracy": summary.test_accuracy,
            "best": summary.best_accuracy,
            "world_size": history.attempts[-1].world_size if history.attempts else None,
            "attempt": len(history.attempts),
            "job_id": history.job_id,
            "host": socket.gethostname(),
            "time": utc_now(),
        }
        last = {"step": saved.get("step"), "epoch": self.saved_epoch, "time": saved.get("time")}
        return {
            **{key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in shown.items()},
            "checkpoint": last if saved else None,
            "history": {**vars(history), "attempts": [{**vars(a), "said": {}} for a in history.attempts]},
            "metrics": vars(summary),
            **{key: getattr(self, key) for key in _SIZES},
            "changed": self.changed,
        }


def read_progress(paths: RunPaths, spec: Spec | None = None) -> Progress:
    """Position and history of a run as its files are now. A run without progress.json gets one.

    Args:
        spec: of the run, where it is known; it is read otherwise, if something has changed.

    Raises:
        OSError: a log cannot be read.
        TypeError, ValueError, ...: values in a log make no sense (DAMAGE).
    """
    try:
        return _brought_up_to_date(paths, _stored(paths), spec)
    except OSError:
        raise
    except DAMAGE:  # perhaps of values of wrong types in progress.json, which nothing depends on
        return _brought_up_to_date(paths, Progress(), spec)


def _brought_up_to_date(paths: RunPaths, progress: Progress, spec: Spec | None) -> Progress:
    left = progress.epochs - progress.epoch
    progress.add_events(paths.events)
    progress.add_metrics(paths.metrics)
    spec_mtime_ns = _mtime_ns(paths.spec)
    if progress.spec_mtime_ns != spec_mtime_ns:
        with contextlib.suppress(UserError, OSError):
            spec = spec or read_frozen(paths)
            if spec is None:
                progress.epochs, progress.log_seconds, progress.eta_seconds = 0, None, None
            else:
                progress.estimate(spec)
                progress.changed = changed_keys(spec)
            progress.spec_mtime_ns = spec_mtime_ns
            _write(paths, progress)
    elif progress.eta_seconds and left > 0:
        # Rows that the run has not counted itself: one of an older version, or one that cannot write the file.
        progress.eta_seconds *= max(0.0, progress.epochs - progress.epoch) / left
    return progress


def update_progress(
    paths: RunPaths, spec: Spec | None = None, eta_by_rate: float | None = None, **position: Any
) -> None:
    """Bring progress.json up to date. A failure is ignored: the logs have it all, and the next update may succeed.

    Args:
        spec: of the run, for a new estimate of the time left; `eta_by_rate` as in `Progress.estimate`.
        position: fields of Progress that have changed.
    """
    with _lock, contextlib.suppress(*DAMAGE):
        progress = read_progress(paths, spec)
        for key, value in position.items():
            setattr(progress, key, value)
        if spec is not None:
            progress.estimate(spec, eta_by_rate)
        _write(paths, progress)


def record_event(paths: RunPaths, event: Event, spec: Spec | None = None, **sender: Any) -> None:
    """Append an event to events.jsonl, and bring progress.json up to date.

    Args:
        sender: job_id, restart and world_size, as for `append_event`.
    """
    append_event(paths.events, event, **sender)
    update_progress(paths, spec)


def _write(paths: RunPaths, progress: Progress) -> None:
    write_atomic(paths.progress, json.dumps(progress.plain()).encode() + b"\n", durable=False)


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _stored(paths: RunPaths) -> Progress:
    """Read progress.json: an empty Progress where it is missing, damaged or of another version."""
    try:
        row = json.loads(read_regular(paths.progress))
        if row["format"] != FORMAT:
            return Progress()
        history = row["history"]
        return Progress(
            **{key: row[key] for key in (*_POSITION, *_SIZES)},
            history=History(**{**history, "attempts": [Attempt(**attempt) for attempt in history["attempts"]]}),
            summary=EpochSummary(**row["metrics"]),
            **{key: row.get(key) for key in ("changed", "doing")},  # older versions write none
        )
    except DAMAGE:
        return Progress()


def _news(path: Path, size: int) -> bytes | None:
    """The content of a log after `size` bytes, and one byte before; None where it has that size. A log that is missing
    or no regular file is empty.

    The file is opened for that: only an open makes an NFS client ask the server for its size.
    """
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return b"" if size else None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size == size:
            return None
        file.seek(max(0, size - 1))
        return file.read()
