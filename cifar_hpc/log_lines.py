"""The lines of train.log, read back: what kind a line is, and how far the run is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.jsonfile import open_regular

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
