"""python -m cifar_hpc track: runs in TensorBoard or Weights & Biases, from their metrics.jsonl.

It runs beside the user, on the login node or at home, where the internet is; the job knows nothing of it. Each `track`
shows all epochs from the first on, in place of what an earlier one has shown. The same happens when a run goes back to
a checkpoint and computes epochs again. So each epoch is there once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from cifar_hpc.cli.tail import StateFollower
from cifar_hpc.config.io import to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError
from cifar_hpc.files import DIRECTORY_MODE, open_regular
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root

SCALARS = {  # name in the tracker: field of metrics.jsonl; steps are epochs
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "optimizer/lr": "lr",
    "speed/epoch_seconds": "epoch_seconds",
    "speed/images_per_second": "images_per_second",
}
POLL_SECONDS = 2.0


class Tracker(Protocol):
    """A program that shows epochs."""

    def show(self, epoch: int, time: float, values: Mapping[str, float]) -> None:
        """Add one epoch, completed at `time` (seconds since 1970)."""

    def flush(self) -> None:
        """Make everything so far safe from a kill, and remove what an earlier `track` has shown."""

    def close(self, finished: bool) -> None:
        """End; `finished` says whether the whole run has finished."""


class TensorBoard:
    """An event file of the tensorboard package in `folder`; those of earlier calls are emptied.

    They are not removed: a TensorBoard that is reading one (with --load_fast=false) would never get to the next.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._older = list(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        # An open TensorBoard forgets what the older file said of step 0 and later.
        self._writer.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))

    def show(self, epoch: int, time: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=epoch, wall_time=time, summary=summary))

    def flush(self) -> None:
        self._writer.flush()
        while self._older:
            with contextlib.suppress(OSError):
                os.close(open_regular(self._older.pop(), os.O_WRONLY | os.O_TRUNC))

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """A run of the wandb package under `folder`/wandb, with the run's name as its id."""

    def __init__(self, folder: Path, run: str, spec: Spec, mode: Literal["online", "offline"], project: str) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # not in a home that is full
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._older = [path for path in (folder / "wandb").glob("*run-*-*") if not path.is_symlink()]
        self._run = wandb.init(
            mode=mode,
            project=project,
            id=run,
            name=run,
            dir=str(folder),
            resume="allow" if mode == "online" else None,
            config=to_plain(spec),
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_stats=True),
        )

    def show(self, epoch: int, time: float, values: Mapping[str, float]) -> None:
        if epoch >= self._run.step:  # online, an epoch that an earlier call has shown stays as it was
            self._run.log({**values, "_timestamp": time}, step=epoch, commit=True)

    def flush(self) -> None:
        while self._older:
            shutil.rmtree(self._older.pop(), ignore_errors=True)

    def close(self, finished: bool) -> None:
        if not finished:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if finished else 1)


class TrackedRun:
    """One run, and the trackers that show it."""

    def __init__(self, paths: RunPaths, spec: Spec, make: Callable[[RunPaths, Spec], list[Tracker]]) -> None:
        self.paths, self._spec, self._make = paths, spec, make
        self.states = StateFollower(paths)
        self._trackers = make(paths, spec)
        self._shown: list[dict[str, Any]] = []

    def poll(self) -> bool:
        """Show new epochs; returns whether there may be more."""
        self.states.poll()
        ended = self.states.ended  # asked before the rows are read, so that the last ones are not missed
        rows = [row for row in read_jsonl(self.paths.metrics) if {"epoch", "time", *SCALARS.values()} <= row.keys()]
        if rows[: len(self._shown)] != self._shown:  # epochs were computed again
            self.close()
            self._trackers, self._shown = self._make(self.paths, self._spec), []
        for row in rows[len(self._shown) :]:
            values = {name: float(row[field]) for name, field in SCALARS.items()}
            for tracker in self._trackers:
                tracker.show(row["epoch"], datetime.fromisoformat(row["time"]).timestamp(), values)
        for tracker in self._trackers:
            tracker.flush()
        self._shown = rows
        return not ended

    def close(self) -> None:
        """End the trackers."""
        finished = bool(self._shown) and self._shown[-1]["epoch"] == self._spec.train.epochs
        for tracker in self._trackers:
            tracker.close(finished)


def track(runs: list[str], tensorboard: str | None, wandb: Literal["online", "offline"] | None, project: str) -> int:
    """Show `runs`, names or patterns, until all have ended or Ctrl-C; returns the exit status 0.

    Raises:
        SpecError: no tracker was chosen, or a run has no spec.
    """
    if tensorboard is None and wandb is None:
        raise SpecError("track: choose --tensorboard DIR, --wandb offline or --wandb online.")

    def trackers(paths: RunPaths, spec: Spec) -> list[Tracker]:
        made: list[Tracker] = []
        if tensorboard is not None:
            made.append(TensorBoard(Path(tensorboard).expanduser() / paths.name))
        if wandb is not None:
            paths.tracking.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            made.append(WandB(paths.tracking, paths.name, spec, wandb, project))
        return made

    tracked: list[TrackedRun] = []
    try:
        for paths in find_runs(project_root(), runs):
            spec = read_frozen(paths)
            if spec is None:
                raise SpecError(f"{paths.spec}: missing; the run {paths.name} has not been submitted.")
            tracked.append(TrackedRun(paths, spec, trackers))
            print(f"tracking {paths.name}", flush=True)
        while sum(run.poll() for run in tracked):
            time.sleep(POLL_SECONDS)
    finally:
        for run in tracked:
            run.close()
    return 0
