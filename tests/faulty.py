"""A run in a process of its own, to whose storage something happens right before given steps.

Before each step the run waits for its checkpoint to be written, so what a fault meets depends on no timing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nursery
import torch
from interrupted import remember_stores, settle

from cifar_hpc.__main__ import main
from cifar_hpc.training import trainer
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.engine import Engine

LIMIT_SECONDS = 200  # only bounds how long a hang lasts
Faults = Mapping[int | str, Callable[[], object]]
released = threading.Event()


def start(root: Path, name: str, faults: Faults, out: Path | None = None) -> int:
    """Train the run `name` of root/job.yaml to its end; returns the exit status.

    Args:
        faults: called in the process of the run before the step, counted from 0; at -1 before all that a job does; at
            "evaluate:E" before the evaluation of epoch E, counted from 0.
        out: where the process's output is appended.
    """
    environment = os.environ | nursery.THREADS | {"CIFAR_HPC_ROOT": str(root)}
    what = nursery.Start(_train, (root, name, dict(faults)), environment, out or root / f"{name}.out")
    (process,) = nursery.start([what])
    return process.wait(LIMIT_SECONDS)


def _train(root: Path, name: str, faults: dict[int | str, Callable[[], object]]) -> int:
    step, run, evaluate = Engine.step, Attempt.run, trainer.evaluate

    def reach(place: int | str) -> None:
        if released.is_set():
            settle()
        if fault := faults.get(place):
            fault()

    def faulty_step(self: Engine, *args: Any) -> None:
        reach(args[2])  # (epoch, step_in_epoch, global_step, rows)
        step(self, *args)

    def faulty_evaluate(engine: Engine, epoch: int, *args: Any) -> Any:
        reach(f"evaluate:{epoch}")
        return evaluate(engine, epoch, *args)

    def faulty_run(self: Attempt) -> int:
        reach(-1)
        return run(self)

    released.set()
    Attempt.run = faulty_run  # type: ignore[method-assign]
    remember_stores()
    Engine.step = faulty_step  # type: ignore[method-assign]
    trainer.evaluate = faulty_evaluate
    return main(["train", str(root / "job.yaml"), "--name", name])


def block_writing() -> None:
    """From now on a checkpoint hangs in the middle of its file, as on a storage that does not answer."""
    save = torch.save

    def slow_save(*args: Any) -> None:
        assert released.wait(LIMIT_SECONDS)
        save(*args)

    released.clear()
    torch.save = slow_save


def block_writing_until_the_end() -> None:
    """The same, until the run waits for its checkpoint because it cannot go on without."""
    wait = CheckpointStore.wait

    def wait_and_release(self: CheckpointStore, *args: Any) -> str | None:
        released.set()
        return wait(self, *args)

    CheckpointStore.wait = wait_and_release  # type: ignore[method-assign]
    block_writing()
