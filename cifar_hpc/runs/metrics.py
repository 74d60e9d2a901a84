"""metrics.jsonl: one row an epoch, kept equal to the rows of the training state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.files import DIRECTORY_MODE, open_regular, read_regular, write_atomic
from cifar_hpc.runs.logs import _complain, _write_all, parse_jsonl


def metrics_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """metrics.jsonl for `rows`."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def restore_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Make metrics.jsonl hold exactly `rows`, those of the training state; returns how many rows beyond them went.

    What a killed run wrote beyond its last checkpoint is cut off in place, and what is lacking at the end is appended,
    so that a `tail -F` goes on; a file that was lost or damaged is written anew. Where that fails, standard error says
    so, and the next call mends it.
    """
    try:
        return write_metrics(path, rows)
    except OSError as error:
        _complain(f"{path}: {error.strerror}; its rows are in the checkpoints too")
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
            _write_all(descriptor, wanted[len(present) :])
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
