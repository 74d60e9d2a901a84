"""python -m cifar_hpc inspect: verify a checkpoint and print what it holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.runs.paths import find_run, project_root
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.training.checkpoints.format import FORMAT, TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.store import candidates, newest_good


def inspect(run: str, step: int | None, *, as_json: bool) -> int:
    """Print a checkpoint's position, figures and sums.

    Raises:
        SpecError: there is no such checkpoint.
        RunFailedError: it does not verify.
    """
    report = describe(*_load(run, step))
    if as_json:
        print(json.dumps(report, indent=1))
        return 0
    for key in ("file", "verified", "step", "epoch", "step_in_epoch", "updates", "shards", "best", "environment"):
        print(f"{key:14} {report[key]}")
    for name, digest in report["sums"].items():
        print(f"{name:14} sha256 {digest}")
    for line in report["skipped"]:
        print(f"{'skipped':14} {line}")
    return 0


def describe(path: Path, state: TrainingState, skipped: list[str]) -> dict[str, Any]:
    """What `inspect --json` prints; `skipped` names newer files that did not verify."""
    rows = state.rows
    return {
        "file": str(path),
        "verified": True,
        "skipped": skipped,
        "format": FORMAT,
        "step": state.step,
        "epoch": state.epoch,
        "step_in_epoch": state.step_in_epoch,
        "updates": state.updates,
        "shards": state.spec["train"]["shards"],
        "best": state.best,
        "environment": state.environment,
        "last_epoch": rows[-1] if rows else None,
        "sums": state.digests(),
        "digest": state.digest,
        "spec": state.spec,
    }


def _load(run: str, step: int | None) -> tuple[Path, TrainingState, list[str]]:
    if run.endswith(".pt"):
        return _read(Path(run))
    directory = find_run(project_root(), run).checkpoints
    if step is not None:
        path = directory / f"step_{step:08d}.pt"
        if not path.exists():
            known = ", ".join(p.stem.removeprefix("step_").lstrip("0") or "0" for p in candidates(directory)) or "none"
            raise SpecError(f"--step: run {run} has no checkpoint of step {step}; there are: {known}.")
        return _read(path)
    found = newest_good(directory)
    if found is None:
        raise SpecError(f"run {run} has no checkpoint in {directory} yet.")
    return found.path, found.state, [f"{path.name}: {reason}" for path, reason in found.bad]


def _read(path: Path) -> tuple[Path, TrainingState, list[str]]:
    if not os.path.lexists(path):
        raise SpecError(f"{path}: there is no such file.")
    try:
        return path, read_checkpoint(path), []
    except BadFileError as error:
        raise RunFailedError(f"{path}: {error}. HINT: without --step, inspect takes the newest good one.") from None
