"""The processes of one start, and the faults that wait for them."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGKILL
from typing import Any

from tests.chaos import plan, ranks
from tests.chaos.plan import KINDS, RANDOM, Fault
from tests.chaos.ranks import Rank
from tests.chaos.trouble import Trouble
from tests.nursery import STACKS

HANG_SECONDS = 150  # only bounds how long a hang lasts, on however busy a machine
# New interpreters are watched as srun and torchrun watch them: where one dies the others are ended after a while. Forks
# have to see to that by themselves.
LAUNCHER_SECONDS = 20
# A random time lies within this many times what an undisturbed run takes; a new interpreter imports torch first.
RANDOM_SPREAD, IMPORT_SECONDS = 0.6, 4.0


@dataclass
class Struck:
    """What came of one fault: `place` is where it was really sought, `outcome` how the start ended."""

    kind: str
    place: str
    world: int
    outcome: str
    details: str = ""
    survivors_seconds: float = 0.0  # from the first death to the last rank's end, where no launcher helped


class Show:
    """One start: arm it, run it, and look at its `ranks`, what was `struck`, and whether it `hung`."""

    def __init__(self, root: Path, spec: str, world: int, number: int, trouble: Trouble | None = None) -> None:
        self.root, self.spec, self.world, self.trouble = root, spec, world, trouble
        self.out = root / f"start-{number}"
        self.ranks: list[Rank] = []
        self.struck: list[Struck] = []
        self.hung = False
        self.fresh = False
        self._targets: list[str] = []  # of each of `struck`
        self._halts: list[dict[str, Any]] = []
        self._timed: list[tuple[float, int, int]] = []  # share of the time, index, rank
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # the kernel gives it an abstract name: no path that could be too long
        self._listener.listen()

    def arm(self, fault: Fault, place: str, count: int) -> None:
        """Have `fault` strike when `place` is passed for the `count`-th time."""
        rank, fresh = fault.rank(self.world), fault.fresh and self.trouble is None  # a new interpreter knows of none
        details = f"time {count}, rank {rank}, target {fault.target}{', fresh' if fresh else ''}"
        index = self._strike_with(fault.kind, place, fault.target, details)
        self.fresh = self.fresh or fresh
        if place == RANDOM:
            self._timed.append((fault.share, index, rank))
        else:
            self._halt(index, place, count, rank)
        if fault.second is not None:
            second, kind = fault.second
            index = self._strike_with(kind, f"{second} while stopping", "all", "rank 0")
            self._halt(index, second, 1, 0, after=str(self.out / "struck"))

    def _strike_with(self, kind: str, place: str, target: str, details: str) -> int:
        self.struck.append(Struck(kind, place, self.world, "not reached", details))
        self._targets.append(target)
        return len(self.struck) - 1

    def _halt(self, index: int, place: str, count: int, rank: int, after: str = "") -> None:
        name = self._listener.getsockname().decode("latin1")
        self._halts.append({"index": index, "place": place, "nth": count, "rank": rank, "after": after, "socket": name})

    def run(self, argv: list[str], seconds: float) -> None:
        """Start the ranks, strike, and wait for their end.

        Args:
            seconds: what an undisturbed run takes, the measure of random times.
        """
        environment = {"CIFAR_HPC_ROOT": str(self.root)}
        if self.spec == "fp16":
            environment["INITIAL_SCALE"] = plan.INITIAL_SCALE
        if self.trouble is not None:
            environment |= self.trouble.environment()
        self.ranks = ranks.start(argv, self.world, environment, self.out, self._halts, self.fresh)
        began = time.monotonic()
        span = seconds * RANDOM_SPREAD + IMPORT_SECONDS * self.fresh
        timed: list[tuple[float, Callable[[], None]]] = [
            (began + share * span, partial(self._strike, index, self.ranks[rank])) for share, index, rank in self._timed
        ]
        if (trouble := self.trouble) is not None and trouble.passes:
            timed += [(begins := began + trouble.share * seconds, trouble.begin)] if trouble.share else []
            timed.append(((begins if trouble.share else began) + trouble.seconds, trouble.end))
        timed.sort(key=lambda entry: entry[0])
        last = began  # when something was done to it
        try:
            while any(rank.status is None for rank in self.ranks):
                if timed and time.monotonic() >= timed[0][0]:
                    timed.pop(0)[1]()
                    last = time.monotonic()
                if time.monotonic() >= last + HANG_SECONDS:
                    self.hung = True
                    break
                self._launcher()
                for caught in self._watch(max(0.0, timed[0][0] - time.monotonic()) if timed else LAUNCHER_SECONDS):
                    with caught:
                        index, number = (int(word) for word in caught.makefile().readline().split())
                        self._strike(index, self.ranks[number], caught)
                    last = time.monotonic()
        finally:
            self._end()
            if trouble is not None:
                trouble.end()

    def _launcher(self) -> None:
        deaths = [rank.ended for rank in self.ranks if rank.killed]
        if self.fresh and deaths and time.monotonic() > min(deaths) + LAUNCHER_SECONDS:
            for rank in self.ranks:
                rank.send(SIGKILL)

    def _watch(self, seconds: float) -> Iterator[socket.socket]:
        """Wait; reap the ranks that have ended, and yield the connections of those that were caught."""
        living = {rank.pidfd: rank for rank in self.ranks if rank.status is None}
        ready, _, _ = select.select([self._listener, *living], [], [], seconds)
        for descriptor in ready:
            if descriptor in living:
                living[descriptor].reap()
            else:
                yield self._listener.accept()[0]

    def _strike(self, index: int, caught: Rank, connection: socket.socket | None = None) -> None:
        kind, target = self.struck[index].kind, self._targets[index]
        others = [self.ranks[(caught.number + 1) % self.world]]
        targets = {"one": [caught], "other": others, "all": self.ranks}[target]
        sent = False
        for number, (what, pause) in enumerate(KINDS[kind]):
            time.sleep(pause)
            for rank in targets:
                sent = rank.send(what) or sent
            if number == 0:
                (self.out / "struck").touch()
                if connection is not None:
                    connection.close()  # lets the rank go on
        if sent:
            self.struck[index].outcome = "struck"

    def _end(self) -> None:
        self._listener.close()
        living = [rank for rank in self.ranks if rank.status is None]
        for rank in living:
            rank.send(SIGCONT)
            rank.send(STACKS)
        wait(living, 2)
        for rank in living:
            if rank.status is None:
                rank.send(SIGKILL)
        wait([rank for rank in living if rank.status is None], HANG_SECONDS)


def wait(processes: list[Rank], seconds: float) -> None:
    """Reap those of `processes` that end within `seconds`."""
    end = time.monotonic() + seconds
    living = {rank.pidfd: rank for rank in processes}
    while living and time.monotonic() < end:
        for descriptor in select.select(list(living), [], [], max(0.0, end - time.monotonic()))[0]:
            living.pop(descriptor).reap()
