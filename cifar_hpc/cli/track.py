"""python -m cifar_hpc track: runs in TensorBoard or Weights & Biases, from their metrics.jsonl.

Reads metrics.jsonl here, on the login node, where the internet is; the job is
not involved. Follows runs until they end, and shows finished ones. Each call
shows all epochs from the first on, in place of those that an earlier call has
shown, so no epoch is there twice. Ctrl-C ends the tracking, not the run.

Needs the packages of requirements-trackers.txt. Offline W&B runs are written
to logs/RUN/tracking/wandb.
"""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar_hpc.cli.tail import StateFollower
from cifar_hpc.config.io import to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError, UserError
from cifar_hpc.files import DIRECTORY_MODE, expand_home, open_regular
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root
from cifar_hpc.runs.queue import QueuePoller
from cifar_hpc.text import one_line

EXAMPLES = ("improved_resnet-1a2b3c4d --tensorboard ~/tensorboard", "'dropout-*' --wandb online --project lab")

SCALARS = {  # name in the tracker: field of metrics.jsonl; steps are epochs
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "optimizer/lr": "lr",
    "speed/epoch_seconds": "epoch_seconds",
    "speed/images_per_second": "images_per_second",
}
POLL_SECONDS, QUEUE_SECONDS = 2.0, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--tensorboard", metavar="DIR", help="write event files to DIR/RUN")
    parser.add_argument("--wandb", choices=("offline", "online"), help="write a W&B run, for later upload or at once")
    parser.add_argument("--project", metavar="P", default="cifar_hpc", help="the W&B project (default: cifar_hpc)")


def main(arguments: argparse.Namespace) -> int:
    """Show runs until all have ended, or Ctrl-C; returns the exit status 0.

    Raises:
        SpecError: no tracker was chosen, or a run has no spec.
    """
    if arguments.tensorboard is None and arguments.wandb is None:
        raise SpecError("track: choose --tensorboard DIR, --wandb offline or --wandb online.")
    tracked: list[TrackedRun] = []
    root = project_root()
    queue = QueuePoller(root, QUEUE_SECONDS)
    try:
        for paths in find_runs(root, arguments.runs):
            tracked.append(TrackedRun(paths, arguments, queue))
            print(f"tracking {paths.name}", flush=True)
        while sum(run.poll() for run in tracked):
            time.sleep(POLL_SECONDS)
    finally:
        for run in tracked:
            run.close()
    return 0


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
        """Add one epoch, completed at `time` (seconds since 1970)."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=epoch, wall_time=time, summary=summary))

    def flush(self) -> None:
        """Write everything so far to disk, and remove the epochs of earlier calls."""
        self._writer.flush()
        while self._older:
            with contextlib.suppress(OSError):
                os.close(open_regular(self._older.pop(), os.O_WRONLY | os.O_TRUNC))

    def close(self, finished: bool) -> None:
        """End; `finished` if all epochs of the run are done."""
        self._writer.close()


class WandB:
    """A run of the wandb package under `folder`/wandb, with the run's name as its id. Its methods are TensorBoard's."""

    def __init__(self, folder: Path, run: str, spec: Spec, mode: Any, project: str) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # not in a home that is full
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._older = [path for path in (folder / "wandb").glob("*run-*-*") if not path.is_symlink()]
        try:
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
        except wandb.errors.Error as error:
            raise UserError(f"--wandb {mode}: {one_line(str(error))} HINT: wandb login, or --wandb offline.") from None

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
    """A run and its trackers.

    Raises:
        SpecError: the run has no spec.
    """

    def __init__(self, paths: RunPaths, arguments: argparse.Namespace, queue: QueuePoller) -> None:
        spec = read_frozen(paths)
        if spec is None:
            raise SpecError(f"{paths.spec}: missing; the run {paths.name} has not been submitted.")
        self.paths, self._spec, self._arguments = paths, spec, arguments
        self.states = StateFollower(paths, queue)
        self._trackers = self._open()
        self._shown: list[dict[str, Any]] = []

    def _open(self) -> list[TensorBoard | WandB]:
        trackers: list[TensorBoard | WandB] = []
        paths, arguments = self.paths, self._arguments
        if arguments.tensorboard is not None:
            trackers.append(TensorBoard(Path(expand_home(arguments.tensorboard, "--tensorboard")) / paths.name))
        if arguments.wandb is not None:
            paths.tracking.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            trackers.append(WandB(paths.tracking, paths.name, self._spec, arguments.wandb, arguments.project))
        return trackers

    def poll(self) -> bool:
        """Show new epochs; returns true while there may be more."""
        self.states.poll()
        ended = self.states.ended  # read before the rows, so that the last ones are not missed
        try:
            rows = [row for row in read_jsonl(self.paths.metrics) if _is_whole(row)]
        except OSError:  # a file server that is away for a moment
            return True
        if rows[: len(self._shown)] != self._shown:  # epochs were computed again
            self.close()
            self._trackers, self._shown = self._open(), []
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


def _is_whole(row: Mapping[str, Any]) -> bool:
    numbers = all(isinstance(row.get(field), int | float) for field in ("epoch", *SCALARS.values()))
    return numbers and isinstance(row.get("time"), str)
