"""Position and time left of a run, from the lines of its train.log and what its epochs have taken so far."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cifar_hpc.config.schedule import epochs_left, training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import UserError
from cifar_hpc.files import open_regular
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import Facts
from cifar_hpc.runs.paths import RunPaths

TAIL_BYTES = 8192  # of the log's end, in which `last_progress` looks for a line
_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
_KINDS = (
    ("banner", re.compile(r"={20}|== ")),
    ("progress", re.compile(rf"{_DATE}epoch \d+/\d+ step ")),
    ("phase", re.compile(rf"{_DATE}(?:evaluating: |epoch \d+: measuring )")),
    ("epoch", re.compile(rf"(?:{_DATE})?epoch +\d+(?:/\d+ DONE)?  train loss ")),
    ("trouble", re.compile(rf"{_DATE}(?:FAILED|HUNG|OUT OF MEMORY|not requeued)|---- ")),
    ("warning", re.compile(rf"{_DATE}WARNING |WARNING ")),
    (
        "stop",
        re.compile(rf"{_DATE}(?:STOPPED|CANCELLED|JobState=|requeue|timeout|preemption|all processes were killed)"),
    ),
    ("good", re.compile(rf"{_DATE}FINISHED ")),
)
_PROGRESS = re.compile(
    rf"{_DATE}epoch (\d{{1,9}})/(\d{{1,9}}) step (\d{{1,9}})/(\d{{1,9}}) \(total \d+\)  loss (\S+)  acc (\S+)%  "
    r"lr \S+  ([0-9,.]{1,30}) img/s  run ETA (?:(\d{1,9}) days?, )?(\d{1,2}):(\d\d):(\d\d)$"
)


def kind_of_line(line: str) -> str:
    """banner, progress, phase (of an epoch's end), epoch, trouble, warning, stop, good, or nothing for other lines."""
    return next((kind for kind, pattern in _KINDS if pattern.match(line)), "")


@dataclass(frozen=True)
class Progress:
    """A line of progress within an epoch.

    epoch: the one that is being trained, from 1, of `epochs`.
    step: steps of this epoch that are done, of `steps`.
    loss, accuracy: of training, over this epoch so far; as text.
    eta_seconds: to the run's end at the present speed.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: str
    accuracy: str
    images_per_second: float
    eta_seconds: float

    @property
    def epochs_done(self) -> float:
        """Epochs that are done, with the part of this one."""
        return self.epoch - 1 + min(1.0, self.step / max(1, self.steps))


def parse_progress(line: str) -> Progress | None:
    """The progress that a line tells, or None where it is no such line."""
    found = _PROGRESS.match(line)
    if found is None:
        return None
    epoch, epochs, step, steps, loss, accuracy, rate, days, hours, minutes, seconds = found.groups()
    left = ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)
    try:
        speed = float(rate.replace(",", ""))
    except ValueError:
        return None
    return Progress(int(epoch), int(epochs), int(step), int(steps), loss, accuracy, speed, float(left))


def last_progress(path: Path) -> Progress | None:
    """The last line of progress near the end of a log, unless an epoch, a start or an end has come after it."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last newline is half a line
        kind = kind_of_line(line)
        if kind == "progress":
            return parse_progress(line)
        if kind in ("epoch", "banner", "good", "stop"):
            return None
    return None


# An hour without a restart is believed before anything has been seen.
PRIOR_UP_SECONDS = 3600.0
_RESIZED = re.compile(rb"^resizing:\n  initial: [0-9]", re.MULTILINE)
HEAD_BYTES = 64 * 1024


def seconds_left(
    paths: RunPaths,
    epoch: int,
    epochs: int,
    facts: Facts,
    progress: Progress | None,
    start: datetime | None,
    now: datetime,
) -> float | None:
    """Seconds until the run's end:

        wait + epochs left x seconds an epoch x (1 + lost / (up + PRIOR_UP_SECONDS))

    wait: until the job is expected to start, where it is queued and Slurm has said so.
    epochs left: with the part of the one under way that is still to be done.
    seconds an epoch: the median of the last few (`Facts.epoch_seconds`), evaluation included; where the images grow, of
        the last one, for as many pixels; before the first has been measured, what the log's own line of progress says.
    lost, up: seconds that restarts have cost so far, and that the run was up (`Facts`): it is taken to be preempted
        from here as often as up to here, and each time at the same cost.
    """
    seconds = [float(s) for s in facts.epoch_seconds]
    if seconds:
        done, resized = progress.epochs_done if progress else float(epoch), _resized(paths)
        if resized is None:
            work = max(0.0, epochs - done) * statistics.median(seconds)
        else:
            growth = training_size(resized, epoch) / training_size(resized, epoch - 1)
            work = epochs_left(resized, done) * seconds[-1] * growth**2
    elif progress is not None:
        work = progress.eta_seconds
    else:
        return None
    wait = max(0.0, (start - now).total_seconds()) if start is not None else 0.0
    return wait + work * (1 + facts.lost_seconds / (facts.up_seconds + PRIOR_UP_SECONDS))


def _resized(paths: RunPaths) -> Spec | None:
    """The spec where images grow during the run; it is parsed only then."""
    with contextlib.suppress(UserError, OSError):
        with os.fdopen(open_regular(paths.spec), "rb") as file:
            resized = _RESIZED.search(file.read(HEAD_BYTES)) is not None
        spec = read_frozen(paths) if resized else None
        return spec if spec is not None and spec.resizing.on else None
    return None
