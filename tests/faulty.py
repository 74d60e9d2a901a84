"""A run in a process of its own, to whose storage something happens right before given steps.

The processes are forked from a server that has imported torch once (multiprocessing's forkserver), so a start costs
little. Before each step the run waits for its checkpoint to be written, so what a fault meets depends on no timing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_hpc.__main__ import main
from cifar_hpc.training import trainer
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.engine import Engine

TESTS = Path(__file__).parent
LIMIT_SECONDS = 200  # only bounds how long a hang lasts
Faults = Mapping[int | str, Callable[[], object]]
stores: list[CheckpointStore] = []
released = threading.Event()


def start(root: Path, name: str, faults: Faults, out: Path | None = None) -> int:
    """Train the run `name` of root/job.yaml to its end; returns the exit status.

    Args:
        faults: called in the process of the run before the step, counted from 0; at -1 before all that a job does; at
            "evaluate:E" before the evaluation of epoch E, counted from 0.
        out: where the process's output is appended.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server looks for what to preload there only
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent))))
        context.set_forkserver_preload(["faulty", "torchvision.datasets.folder", "cifar_hpc.data.synthetic"])
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    process = context.Process(target=_train, args=(root, name, dict(faults), out or root / f"{name}.out"))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    status = process.exitcode
    process.close()
    assert status is not None
    return status


def _train(root: Path, name: str, faults: dict[int | str, Callable[[], object]], out: Path) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= {"CIFAR_HPC_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    init, step, run, evaluate = CheckpointStore.__init__, Engine.step, Attempt.run, trainer.evaluate

    def remember(self: CheckpointStore, *args: Any) -> None:
        init(self, *args)
        stores.append(self)

    def reach(place: int | str) -> None:
        for store in stores:
            while store.busy and released.is_set():
                time.sleep(0.001)
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
    CheckpointStore.__init__ = remember  # type: ignore[method-assign]
    Engine.step = faulty_step  # type: ignore[method-assign]
    trainer.evaluate = faulty_evaluate
    sys.exit(main(["train", str(root / "job.yaml"), "--name", name]))


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
