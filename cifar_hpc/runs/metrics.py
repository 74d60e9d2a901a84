"""metrics.jsonl: one row an epoch, kept equal to the rows of the training state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_hpc.files import DIRECTORY_MODE, open_regular, read_regular, write_atomic
from cifar_hpc.runs.logs import complain, parse_jsonl, write_all

RECENT_EPOCHS = 5  # from which the time left is estimated


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
        same = [row for row in recent if row.get("world_size") == last.get("world_size")]
        return cls(
            epoch=int(last.get("epoch", 0)),
            step=int(last.get("step", 0)),
            **{key: float(last[key]) for key in _OF_LAST if last.get(key) is not None},
            best_accuracy=max((float(row["test_accuracy"]) for row in rows if "test_accuracy" in row), default=None),
            epoch_seconds=[float(row["epoch_seconds"]) for row in same if "epoch_seconds" in row],
        )


_OF_LAST = ("train_loss", "train_accuracy", "lr", "test_accuracy", "images_per_second")


def metrics_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """metrics.jsonl for `rows`."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def restore_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Make metrics.jsonl hold exactly `rows`, those of the training state; returns the number of rows removed.

    Rows that a killed attempt wrote after its last checkpoint are cut off in place, and missing rows are appended, so
    that a `tail -F` continues; a lost or damaged file is replaced. A failure is reported on standard error; the next
    call repairs it.
    """
    try:
        return write_metrics(path, rows)
    except OSError as error:
        complain(f"{path}: {error.strerror}; its rows are in the checkpoints too")
        return 0


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """`restore_metrics`, where a failure matters.

    Raises:
        OSError: the file cannot be written.
    """
    wanted = metrics_text(rows).encode()
    path.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    try:
        present = read_regular(path)
    except FileNotFoundError:
        present = b""
    if present == wanted:
        return 0
    if wanted.startswith(present):
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            write_all(descriptor, wanted[len(present) :])
        finally:
            os.close(descriptor)
        return 0
    beyond = {row["epoch"] for row in parse_jsonl(present) if isinstance(row.get("epoch"), int)}
    beyond -= {row["epoch"] for row in rows}
    if present.startswith(wanted):
        descriptor = open_regular(path, os.O_RDWR)
        try:
            os.ftruncate(descriptor, len(wanted))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        write_atomic(path, wanted)
    return len(beyond)
