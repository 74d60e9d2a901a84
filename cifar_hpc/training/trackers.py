"""python -m cifar_hpc.training.trackers TRACKER ROOT RUN: the process beside a run that shows its metrics to a tracker.

It reads metrics.jsonl whenever a byte comes in at standard input, and ends when that is closed, as it is when the
process of the run has gone. Each start of the run has a new such process, which tells the tracker all epochs from the
first on, in place of what the one before it had told: so each epoch is there once, whatever was lost or computed again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cifar_hpc.config.io import to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.files import open_regular
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, keep_others_out

SCALARS = {  # what trackers call it: its field in metrics.jsonl; steps are epochs
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "optimizer/lr": "lr",
    "speed/epoch_seconds": "epoch_seconds",
    "speed/images_per_second": "images_per_second",
}
# A tracker that takes longer over one round is killed by SIGALRM, also where it hangs outside of Python.
ROUND_SECONDS = 60


class Tracker(Protocol):
    """What shows epochs. Whatever it raises ends its process, and nothing else."""

    def show(self, epoch: int, time: float, values: Mapping[str, float]) -> None:
        """One epoch, once; `time` in seconds since 1970, when it was completed."""

    def flush(self) -> None:
        """Everything so far is to be safe from a kill."""

    def close(self, finished: bool) -> None:
        """No more epochs; `finished`: of the whole run, not of this start alone."""


class TensorBoard:
    """An event file of the tensorboard package in `folder`; those of earlier starts are emptied.

    They are not removed: a TensorBoard that is reading one (with --load_fast=false) would never get to the next.
    """

    def __init__(self, folder: Path, run: str, spec: Spec) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._older = list(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        # To a TensorBoard that is open: forget what the older file said of step 0 and later.
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
                _empty(self._older.pop())

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """A run of the wandb package under `folder`/wandb, alone there, with the run's name as its id."""

    def __init__(self, folder: Path, run: str, spec: Spec) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # not in a home that is full
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would need the internet, too
        import wandb

        self._older = [path for path in (folder / "wandb").glob("*run-*-*") if not path.is_symlink()]
        self._run = wandb.init(
            mode=spec.tracking.wandb,
            project=spec.tracking.project,
            id=run,
            name=run,
            dir=str(folder),
            resume="allow" if spec.tracking.wandb == "online" else None,
            config=to_plain(spec),
            settings=wandb.Settings(
                init_timeout=ROUND_SECONDS / 2,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def show(self, epoch: int, time: float, values: Mapping[str, float]) -> None:
        if epoch >= self._run.step:  # online it may have been shown by an earlier start, and stays as it was
            self._run.log({**values, "_timestamp": time}, step=epoch, commit=True)

    def flush(self) -> None:
        while self._older:
            shutil.rmtree(self._older.pop(), ignore_errors=True)

    def close(self, finished: bool) -> None:
        if not finished:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[str, Callable[[Path, str, Spec], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def main(tracker: str, root: str, run: str) -> int:
    """Show a run's epochs until standard input is closed; the exit status, with the reason on standard error."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they go to every process of a job; the run says when to end
    keep_others_out()
    try:
        _follow(RunPaths(Path(root), run), TRACKERS[tracker])
    except Exception as error:
        hint = " HINT: pip install -r requirements-trackers.txt" if isinstance(error, ModuleNotFoundError) else ""
        print(" ".join(f"{type(error).__name__}: {error}{hint}".split()), file=sys.stderr, flush=True)
        return 1
    return 0


def _follow(paths: RunPaths, make: Callable[[Path, str, Spec], Tracker]) -> None:
    spec = read_frozen(paths)
    assert spec is not None, f"{paths.spec} is missing"
    signal.alarm(ROUND_SECONDS)
    tracker = make(paths.tracking, paths.name, spec)
    shown, closed = 0, False
    while True:
        signal.alarm(ROUND_SECONDS)
        for row in read_jsonl(paths.metrics):
            if row["epoch"] > shown:
                values = {tag: float(row[field]) for tag, field in SCALARS.items()}
                tracker.show(row["epoch"], datetime.fromisoformat(row["time"]).timestamp(), values)
                shown = row["epoch"]
        tracker.flush()
        if closed:
            break
        signal.alarm(0)
        closed = not os.read(sys.stdin.fileno(), 4096)
    tracker.close(finished=shown == spec.train.epochs)


def _empty(path: Path) -> None:
    """Take away what is in a file, and leave the file."""
    os.close(open_regular(path, os.O_WRONLY | os.O_TRUNC))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
