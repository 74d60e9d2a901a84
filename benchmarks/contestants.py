"""Training processes that take turns: each keeps its state, takes steps when told to, and is frozen in between.

Frozen (SIGSTOP to the process and its DataLoader workers), it takes nothing from the one whose turn it is, and its
workers prefetch nothing that would make its next turn look short.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.measure import ROOT

if TYPE_CHECKING:
    from cifar_hpc.training.engine import Engine

OURS, NAIVE, CAREFUL, LIGHTNING = "ours", "naive", "careful", "lightning"
PATIENCE_SECONDS = 20


class Contestant:
    """One of them, as the driver sees it.

    Args:
        name: ours | naive | careful | lightning.
        batch: images in a step.
        images: in the training set.
        threads: of the process that computes.
        folder: for its checkpoints and its output.
        amp: auto | fp32.
    """

    def __init__(self, name: str, batch: int, images: int, threads: int, folder: Path, amp: str = "auto") -> None:
        self.name, self.batch = name, batch
        self._output = folder / f"{name}.txt"
        command = [sys.executable, "-m", "benchmarks.contestants", name, "--batch", batch, "--images", images]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [str(word) for word in [*command, "--threads", threads, "--folder", folder, "--amp", amp]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=ROOT,
                process_group=0,  # its workers with it; should the driver be killed, the kernel ends frozen groups
            )

    def wait_ready(self) -> None:
        """Wait until its imports are done, and freeze it.

        Raises:
            RuntimeError: with the last line that it wrote, if it ended instead.
        """
        self._hear()
        self._signal(signal.SIGSTOP)

    def take(self, steps: int) -> float:
        """Seconds that its next `steps` steps take; the first turn sets up the model, too.

        Raises:
            RuntimeError: with the last line that it wrote, if it ended instead.
        """
        self._signal(signal.SIGCONT)
        began = time.perf_counter()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # _hear says why
            print(steps, file=self._process.stdin, flush=True)
        self._hear()
        seconds = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        return seconds

    def _hear(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            lines = self._output.read_text().strip().splitlines()
            raise RuntimeError(f"{self.name} ended: {lines[-1] if lines else 'it wrote nothing'}")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it and its workers."""
        self._signal(signal.SIGKILL)
        self._process.wait(PATIENCE_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Turns:
    """The contestant's end: called after each step, it waits for the next turn when the present one is over."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._left = 0

    def wait(self) -> None:
        """Say that this turn is over; return when the next one begins. Ends the process when there is none."""
        print("done", file=self._answers, flush=True)
        order = sys.stdin.readline()
        if not order:
            os._exit(0)
        self._left = int(order)

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.wait()


def train_ours(
    images: int, after_step: Callable[[], None], batch: int, threads: int, epochs: int = 400, amp: str = "auto"
) -> None:
    """The report's recipe as `python -m cifar_hpc train` runs it, with synthetic images."""
    import torch

    from cifar_hpc.config.io import from_plain
    from cifar_hpc.data.datasets import Dataset
    from cifar_hpc.data.synthetic import make_synthetic
    from cifar_hpc.training.distributed.shards import ShardLayout
    from cifar_hpc.training.engine import Engine
    from cifar_hpc.training.environment import configure_torch, resolve_amp

    spec = from_plain({"train": {"batch_size": batch, "shards": 1, "cpu_threads": threads, "amp": amp}})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_torch(spec, device)
    data = Dataset(*make_synthetic(images, batch)).to(device)
    engine = Engine(spec, device, ShardLayout(1, 1, 0), data, resolve_amp(spec, device))
    for epoch in range(epochs):
        train_epoch(engine, epoch, after_step)


def train_epoch(
    engine: Engine, epoch: int, after_step: Callable[[], None] = lambda: None, steps: int | None = None
) -> None:
    """The first `steps` steps of an epoch, or all, without what the trainer does around them."""
    from cifar_hpc.randomness import permutation

    spec, images = engine.spec, len(engine.data.train_images)
    order = permutation(spec.train.seed, epoch, images).to(engine.device)
    for step in range(steps or engine.steps_per_epoch):
        done = epoch * engine.steps_per_epoch + step
        engine.step(epoch, step, done, order)
        after_step()


def main() -> None:
    """Be the contestant that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=(OURS, NAIVE, CAREFUL, LIGHTNING))
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--amp", choices=("auto", "fp32"), default="auto")
    options = parser.parse_args()
    turns = Turns(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what a peer prints goes with its errors; standard output is the driver's

    import torch

    torch.set_num_threads(options.threads)
    if options.name == OURS:
        import cifar_hpc.training.engine  # noqa: F401  (before the first turn)

        turns.wait()
        train_ours(options.images, turns, options.batch, options.threads, amp=options.amp)
        return
    from benchmarks.peers.data import synthetic_images

    if options.name == NAIVE:
        from benchmarks.peers.naive import train
    elif options.name == CAREFUL:
        from benchmarks.peers.careful import train
    else:
        from benchmarks.peers.lightning_peer import train
    images = synthetic_images(options.images)
    folder = options.folder / options.name
    folder.mkdir()
    turns.wait()
    in_float32 = {"bf16": False} if options.name == CAREFUL and options.amp == "fp32" else {}
    train(images, folder, turns, batch_size=options.batch, **in_float32)


if __name__ == "__main__":
    main()
