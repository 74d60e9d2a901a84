"""Forks writers of checkpoints and kills each with SIGKILL; what then lies in the folder must verify.

python crashing_writer.py FOLDER. Prints one line a kill. Run by test_store.py in a process of its own, since forking is
only safe while torch has started no thread.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import blank_state

from cifar_hpc import files
from cifar_hpc.training.checkpoints import store
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.store import BEST, CheckpointStore, candidates, newest_good, read_index


def state(step: int) -> TrainingState:
    return blank_state(step, number=step)


def write_for_ever(folder: Path, first: int) -> None:
    writer = CheckpointStore(folder, 2, lambda event: None, lambda text: os._exit(3))
    step = first
    while True:
        step += 1
        writer.save(state(step), best=step % 2 == 0)
        writer.wait()


def die_at(owner: Any, name: str, call: int) -> None:
    """Die at the given call of `owner.name`, before it has done anything."""
    original: Callable[..., Any] = getattr(owner, name)
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def die_half_way(content: Any, file: Any) -> None:
    """In place of torch.save: die with half of the file written."""
    buffer = io.BytesIO()
    torch.serialization.save(content, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(4)
    return pid


def verify(folder: Path, at_least: int, what: str) -> int:
    """The step of the newest checkpoint, after checking all that may lie in the folder."""
    for path in [*candidates(folder), folder / BEST]:
        if path.exists():
            loaded = read_checkpoint(path)
            assert all((weight == loaded.step).all() for weight in loaded.model.values())
    found = newest_good(folder)
    step = found.state.step if found else 0
    assert found is None or found.bad == []
    assert step >= at_least, f"{what}: step {step} after {at_least} was on disk"
    read_index(folder)
    CheckpointStore(folder, 2, lambda event: None, lambda text: None)
    assert not list(folder.glob(".*")), "leftovers"
    indexed = [name for name in read_index(folder) if name != BEST]
    assert indexed == sorted(path.name for path in candidates(folder)), "index"
    assert len(candidates(folder)) <= 2, "old files"
    print(what, "->", step, flush=True)
    return step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    step = 0
    points = [(os, "fsync"), (os, "link"), (torch, "save"), (Path, "replace"), (Path, "unlink")]
    points += [(store, "duplicate"), (store, "write_atomic"), (files, "sync_directory")]
    for owner, name in points:
        for call in (1, 2):

            def work(owner: Any = owner, name: str = name, call: int = call, first: int = step) -> None:
                die_at(owner, name, call)
                write_for_ever(folder, first)

            _, status = os.waitpid(child(work), 0)
            assert status == signal.SIGKILL, f"{name} {call}: status {status}"
            step = verify(folder, step, f"{name} {call}")
    for name in ("half", "half of the same step"):

        def work(first: int = step - (name != "half")) -> None:
            torch.save = die_half_way
            write_for_ever(folder, first)

        _, status = os.waitpid(child(work), 0)
        assert status == signal.SIGKILL, f"{name}: status {status}"
        step = verify(folder, step, name)
    moments = random.Random(0)
    for _ in range(12):
        pid = child(lambda first=step: write_for_ever(folder, first))  # type: ignore[misc]
        time.sleep(moments.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert status == signal.SIGKILL, f"status {status}"
        step = verify(folder, step, "random")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
