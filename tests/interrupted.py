"""python -m cifar_hpc ..., with a signal to itself at one precise place: no test has to guess a moment.

Before it, the process waits for its checkpoints to be written, so that no outcome depends on the disk.

INTERRUPT=SIGNAL@step:N       before step N (counted from 0)
INTERRUPT=SIGNAL@agree:N      after N steps, before the ranks agree
INTERRUPT=SIGNAL@evaluate:E   before the evaluation of epoch E (counted from 0)
INTERRUPT=SIGNAL@step:N/RANK  the same, on that rank only
INTERRUPT=RAISE@step:N/RANK   an exception there instead of a signal; OOM@...: a failed allocation
INITIAL_SCALE=X               GradScaler begins at X
LAG=N                         the lag of the agreement, which is 1 on GPUs and 0 on CPUs
IMPATIENT=1                   limits that a suspension of a second exceeds, wherever one could be taken for a fault
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from cifar_hpc.__main__ import main
from cifar_hpc.training import attempt, trainer
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.distributed import watchdog
from cifar_hpc.training.distributed.group import Agreement
from cifar_hpc.training.engine import Engine

stores: list[CheckpointStore] = []  # those of this process


def remember_stores() -> None:
    """From now on `settle` knows each store that is made."""
    init = CheckpointStore.__init__

    def remember(self: CheckpointStore, *args: Any) -> None:
        init(self, *args)
        stores.append(self)

    CheckpointStore.__init__ = remember  # type: ignore[method-assign]


def settle() -> None:
    """Wait until every checkpoint is written."""
    while any(store.busy for store in stores):
        time.sleep(0.001)


def fault(name: str) -> None:
    """A signal to this process, or an exception."""
    if name == "RAISE":
        raise ValueError("a fault in the middle of a step")
    if name == "OOM":
        torch.empty(2**50)
    os.kill(os.getpid(), getattr(signal, name))


def interrupt(rule: str) -> None:
    """Arrange for what `rule` says."""
    match = re.fullmatch(r"(SIG\w+|RAISE|OOM)@(step|agree|evaluate):(\d+)(?:/(\d+))?", rule)
    assert match, rule
    name, place, number, rank = match.groups()
    if rank is not None and rank != os.environ.get("RANK", "0"):
        return
    remember_stores()

    def before(owner: Any, attribute: str, count: Callable[..., int]) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)

        def wrapper(*args: Any) -> Any:
            if count(*args) == int(number):
                settle()
                fault(name)
            return original(*args)

        setattr(owner, attribute, wrapper)

    if place == "step":
        before(Engine, "step", lambda engine, epoch, step_in_epoch, global_step, rows: global_step)
    elif place == "agree":
        before(trainer.Trainer, "_decide", lambda trainer, now: trainer.position.step)
    else:
        before(trainer, "evaluate", lambda engine, epoch, between: epoch)


def play(arguments: list[str]) -> int:
    """Run the command with what the environment asks for; returns its exit status."""
    sys.argv = [__file__, *arguments]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has all tests ignore
    if rule := os.environ.get("INTERRUPT"):
        interrupt(rule)
    if scale := os.environ.get("INITIAL_SCALE"):
        torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=float(scale))
    if lag := os.environ.get("LAG"):
        attempt.Agreement = lambda world, **_: Agreement(world, int(lag))  # type: ignore[assignment,misc]
    if os.environ.get("IMPATIENT"):
        c10d._get_default_timeout = lambda backend: timedelta(seconds=0.8)
        watchdog.TICK_SECONDS, watchdog.SILENT_TICKS, watchdog.PATIENCE_TICKS = 0.1, 2, 3
    return main(arguments)


if __name__ == "__main__":
    sys.exit(play(sys.argv[1:]))
