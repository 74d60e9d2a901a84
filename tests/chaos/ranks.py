"""The processes of one start: started, struck, waited for. Signals go through pidfds, so none can hit a stranger."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.nursery import STACKS, WORDS

PROJECT = Path(__file__).resolve().parents[2]
READY_SECONDS = 300  # limits only bound a hang


def clean_environment() -> dict[str, str]:
    """Ours, without what would make a rank believe that it runs in somebody's job, and without thread pools."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SUBMITIT", "TORCHELASTIC"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | threads | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(PROJECT)}


class Nursery:
    """The other end of nursery.py."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(READY_SECONDS)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nursery", str(theirs.fileno())],
                cwd=PROJECT,
                env=clean_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._ready = False
        self._one_at_a_time = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer; from any thread."""
        with self._one_at_a_time:
            while not self._ready:
                self._ready = self._receive()["ready"]
            self._channel.send(json.dumps(request).encode())
            return self._receive()

    def _receive(self) -> dict[str, Any]:
        message = self._channel.recv(WORDS)
        if not message:
            raise RuntimeError("the nursery has died; its words are above")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def close(self) -> None:
        """End it; what it forked dies with it."""
        self._channel.close()
        self.process.wait(READY_SECONDS)


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
    nursery: Nursery | None
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
            assert self.nursery is not None
            self.status = self.nursery.ask({"reap": self.pid})["status"]
        self.ended = time.monotonic()
        os.close(self.pidfd)

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, be it SIGKILL or one that it had no handler for yet."""
        return self.status is not None and self.status < 0 and -self.status in self.sent


def start(
    nursery: Nursery,
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
    port = str(_free_port())
    environments, outs = [], [out / f"{number}.out" for number in range(world)]
    for number in range(world):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        places = {k: str(v) for k, v in place.items()}
        environments.append(environment | places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    if not fresh:
        request = [
            {"argv": argv, "env": environments[r], "out": str(outs[r]), "halts": [h for h in halts if h["rank"] == r]}
            for r in range(world)
        ]
        pids = nursery.ask({"start": request})["pids"]
        return [Rank(number, pid, outs[number], nursery) for number, pid in enumerate(pids)]
    ranks = []
    for number in range(world):
        with outs[number].open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "cifar_hpc", *argv],
                cwd=PROJECT, env=clean_environment() | environments[number], stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ranks.append(Rank(number, process.pid, outs[number], None, process))
    return ranks


def _free_port() -> int:
    # Below the range that the kernel hands out, where another test's sockets are.
    for port in iter(lambda: 10_000 + int.from_bytes(os.urandom(2)) % 20_000, None):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError
