"""A run's folder of checkpoints: written in the background, atomic, indexed, and read back newest good first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_hpc import checkpoint
from cifar_hpc.checkpoint import BadCheckpointError
from cifar_hpc.errors import RunFailedError
from cifar_hpc.jsonfile import sync_directory, write_atomic
from cifar_hpc.runlog import utc_now

BEST = "best.pt"
INDEX = "index.json"


def candidates(directory: Path) -> list[Path]:
    """Checkpoint files by step, newest first."""
    found = [
        (int(m.group(1)), p) for p in directory.glob("step_*.pt") if (m := re.fullmatch(r"step_(\d+)\.pt", p.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Found:
    """A checkpoint that verifies, and the newer files that do not, each with the reason."""

    path: Path
    state: dict[str, Any]
    bad: list[tuple[Path, str]]


def newest_good(directory: Path) -> Found | None:
    """The newest checkpoint that verifies, or None in a new run. Changes nothing.

    Raises:
        RunFailedError: where there are checkpoints and none is good. Starting over unasked would lose the run.
    """
    bad: list[tuple[Path, str]] = []
    for path in candidates(directory):
        try:
            return Found(path, checkpoint.read(path), bad)
        except BadCheckpointError as error:
            bad.append((path, str(error)))
    if bad:
        raise RunFailedError(
            "no checkpoint of the run is good; tried, newest first:\n"
            + "\n".join(f"  {path}: {reason}" for path, reason in bad)
            + "\nHINT: restore one from a backup, or move these away to start from step 0."
        )
    return None


class CheckpointStore:
    """Writes checkpoints from a thread of its own, one at a time. Rank 0 only.

    Args:
        directory: checkpoints/<run>.
        keep: newest files kept, beside best.pt.
        on_written: told (file name, entry of the index) from the writing thread after each durable checkpoint.
        on_failed: told (file name, reason) when one could not be written; training goes on.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        on_written: Callable[[str, dict[str, Any]], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        self.directory, self.keep = directory, keep
        self.on_written, self.on_failed = on_written, on_failed
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)  # of a writer that was killed; the lock says that none is alive

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Begin to write `state`, a tree of tensors in host memory that nobody changes any more."""
        self.wait()
        self._error = None
        # Not a daemon: an interpreter that ends on its own waits for the file.
        self._thread = threading.Thread(target=self._write, args=(state, best), name="checkpoint")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait until nothing is being written; the reason if the last one failed."""
        if self._thread is not None:
            self._thread.join()
        return self._error

    def _write(self, state: dict[str, Any], best: bool) -> None:
        name = f"step_{state['step']:08d}.pt"
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            checkpoint.seal(state)
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            sha256 = _file_sha256(temporary)
            temporary.replace(self.directory / name)
            sync_directory(self.directory)
            entry = {
                "step": state["step"],
                "epoch": state["epoch"],
                "step_in_epoch": state["step_in_epoch"],
                "sha256": sha256,
                "bytes": (self.directory / name).stat().st_size,
                "time": utc_now(),
            }
            if best:
                self._link_best(name, entry)
            self._index(name, entry, best)
        except Exception as error:  # a full disk reaches us as OSError or as torch's RuntimeError
            temporary.unlink(missing_ok=True)
            self._error = f"{type(error).__name__}: {error}"
            self.on_failed(name, self._error)
        else:
            self.on_written(name, entry)

    def _link_best(self, name: str, entry: dict[str, Any]) -> None:
        temporary = self.directory / f".{BEST}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.directory / name, temporary)
        except OSError:  # a file system without hard links
            write_atomic(self.directory / BEST, (self.directory / name).read_bytes())
            return
        temporary.replace(self.directory / BEST)
        sync_directory(self.directory)

    def _index(self, name: str, entry: dict[str, Any], best: bool) -> None:
        index = read_index(self.directory)
        index["checkpoints"][name] = entry
        if best:
            index["best"] = {"file": BEST, **entry}
        kept = {p.name for p in candidates(self.directory)[: self.keep]}
        index["checkpoints"] = {n: e for n, e in sorted(index["checkpoints"].items()) if n in kept}
        write_atomic(self.directory / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        for path in candidates(self.directory):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, or an empty one: it is a convenience, never what a resume depends on."""
    try:
        index = json.loads((directory / INDEX).read_text())
        return {"checkpoints": dict(index["checkpoints"]), "best": index.get("best")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"checkpoints": {}, "best": None}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
