"""index.json of a run's checkpoints: for people and scripts. No resume depends on it, and every save mends it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_hpc import checkpoint
from cifar_hpc.checkpoint import BadCheckpointError
from cifar_hpc.errors import RunFailedError
from cifar_hpc.jsonfile import read_regular, write_atomic

BEST = "best.pt"
INDEX = "index.json"
_KINDS = {"step": int, "epoch": int, "step_in_epoch": int, "sha256": str, "bytes": int, "mtime_ns": int, "time": str}


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, or as much of it as is one: {"checkpoints": {file name: entry}, "best": entry or None}."""
    try:
        index = json.loads(read_regular(directory / INDEX))
        checkpoints, best = dict(index["checkpoints"]), index.get("best")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"checkpoints": {}, "best": None}
    return {
        "checkpoints": {name: entry for name, entry in checkpoints.items() if _is_entry(entry)},
        "best": best if _is_entry(best) else None,
    }


def update_index(directory: Path, names: Iterable[str], new: dict[str, dict[str, Any]]) -> None:
    """Make index.json right for the checkpoints `names` and for best.pt.

    Args:
        new: entries known already, by file name. The others are taken over from the present index where they fit the
            file, and else made anew from it.

    Raises:
        OSError: it cannot be written.
    """
    old = read_index(directory)
    known = {**old["checkpoints"], BEST: old["best"], **new}
    entries = {name: _fitting(directory / name, known.get(name)) for name in [*sorted(names), BEST]}
    best = entries.pop(BEST)
    index = {
        "checkpoints": {name: entry for name, entry in entries.items() if entry is not None},
        "best": {"file": BEST, **best} if best is not None else None,
    }
    content = (json.dumps(index, indent=1) + "\n").encode()
    with suppress(OSError):
        if read_regular(directory / INDEX) == content:
            return
    write_atomic(directory / INDEX, content)


def entry(path: Path, state: dict[str, Any], sha256: str, time: str) -> dict[str, Any]:
    """What the index says about the file `path`. Size and mtime_ns tell later whether it is still the same file."""
    status = path.stat()
    position = {key: state[key] for key in ("step", "epoch", "step_in_epoch")}
    return {**position, "sha256": sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "time": time}


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in _KINDS.items())


def _fitting(path: Path, known: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entry of a file: the known one if it is of this file, else one made from it; None where it is not good."""
    with suppress(OSError, BadCheckpointError, RunFailedError):
        status = path.stat()
        if known is not None and (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return {key: known[key] for key in _KINDS}
        state = checkpoint.read(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        written = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="milliseconds")
        return entry(path, state, sha256, written.replace("+00:00", "Z"))
    return None
