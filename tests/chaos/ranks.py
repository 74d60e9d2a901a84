"""The processes of one start: started, struck, waited for. Signals go through pidfds, so none can hit a stranger."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.nursery import PROJECT, STACKS, THREADS, Start, free_port, nursery

COME_UP_SECONDS = 30  # a fork comes up at once; a rank that died before it did so must not cost minutes


def clean_environment() -> dict[str, str]:
    """Ours, without what would make a rank believe that it runs in somebody's job, and without thread pools."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SUBMITIT", "TORCHELASTIC"))}
    return kept | THREADS | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(PROJECT)}


@dataclass
class Rank:
    """One process of a start.

    Attributes:
        out: file of its output.
        status: as in subprocess: negative for the signal that ended it; None while it lives.
        sent: signals that were sent to it while it lived.
        ended: time.monotonic() of its end.
    """

    number: int
    pid: int
    out: Path
    process: subprocess.Popen[bytes] | None = None
    status: int | None = None
    sent: list[signal.Signals] = field(default_factory=list)
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.pidfd = os.pidfd_open(self.pid)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; false if the process has ended."""
        if self.status is not None or select.select([self.pidfd], [], [], 0)[0]:
            return False
        signal.pidfd_send_signal(self.pidfd, number)
        if number is not STACKS:
            self.sent.append(number)
        return True

    def reap(self) -> None:
        """Once its pidfd is readable: take its status."""
        if self.process is not None:
            self.status = self.process.wait()
        else:
            self.status = nursery().reap(self.pid)
        self.ended = time.monotonic()
        os.close(self.pidfd)

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, be it SIGKILL or one that it had no handler for yet."""
        return self.status is not None and self.status < 0 and -self.status in self.sent


def start(
    argv: list[str],
    world: int,
    environment: dict[str, str],
    out: Path,
    halts: list[dict[str, Any]],
    fresh: bool,
) -> list[Rank]:
    """Start `python -m cifar_hpc ARGV` as `world` ranks.

    Args:
        out: a folder; rank R appends to R.out.
        halts: see places.py; with each the rank that is to obey it.
        fresh: as new interpreters, which know no halts, instead of forks.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    environments, outs = [], [out / f"{number}.out" for number in range(world)]
    for number in range(world):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        places = {k: str(v) for k, v in place.items()}
        environments.append(
            clean_environment() | environment | places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        )
    if not fresh:
        mine = [[halt for halt in halts if halt["rank"] == number] for number in range(world)]
        return fork([Start(be, (argv, mine[r]), environments[r], outs[r]) for r in range(world)])
    ranks = []
    for number in range(world):
        with outs[number].open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "cifar_hpc", *argv],
                cwd=PROJECT, env=environments[number], stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ranks.append(Rank(number, process.pid, outs[number], process))
    return ranks


def fork(starts: list[Start]) -> list[Rank]:
    """Processes from the nursery."""
    return [Rank(number, pid, starts[number].out) for number, pid in enumerate(nursery().start(starts))]


def be(argv: list[str], halts: list[dict[str, Any]]) -> int:
    """In a fork: python -m cifar_hpc ARGV, held where `halts` say."""
    from cifar_hpc.training.distributed import group
    from tests.chaos import places, trouble
    from tests.interrupted import play

    places.install(halts)
    trouble.install()
    group.RENDEZVOUS_SECONDS = COME_UP_SECONDS
    return play(argv)
