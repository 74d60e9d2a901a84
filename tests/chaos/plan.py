"""What will be done to which run: a pure function of the seed."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any, TypeVar

from tests.chaos.places import PLACES

T = TypeVar("T")

# 140 images are 4 whole batches and one of 12 images: 5 steps an epoch, 20 in all.
STEPS_PER_EPOCH, EPOCHS, SHARDS = 5, 4, 4
IMAGES = {"train": 14, "test": 6}  # of each class
TINY: dict[str, dict[str, Any]] = {
    "model": {"width_multiplier": 0.0625, "blocks": [1, 1, 1], "dropout": 0.1},
    "train": {
        "epochs": EPOCHS, "batch_size": 32, "shards": SHARDS, "cpu_threads": 1, "device": "cpu", "amp": "fp32",
        "log_seconds": 0.2,
    },
    "data": {"source": "synthetic", "train_size": 140, "test_size": 60},
    "lookahead": {"bn_batches": 3},
    "resources": {"gpus_per_node": 0},
}  # fmt: skip
# What may change the bits; each has a reference of its own.
SPECS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"train": {"amp": "bf16"}},
    "fp16": {"train": {"amp": "fp16"}},  # begins at a scale that overflows, see INITIAL_SCALE
    "plain-sgd": {"lookahead": {"enabled": False}},
    "images": {"data": {"source": "folder", "root": "images", "train_size": None, "test_size": None}},
}
INITIAL_SCALE = str(2.0**26)

Blow = tuple[signal.Signals, float]  # a signal, and the seconds to wait before it
# The rank that was caught goes on after the first.
KINDS: dict[str, tuple[Blow, ...]] = {
    "KILL": ((SIGKILL, 0),),
    "TERM": ((SIGTERM, 0),),
    "USR1": ((SIGUSR1, 0),),
    "USR2": ((SIGUSR2, 0),),
    "STOP CONT": ((SIGSTOP, 0), (SIGCONT, 0.3)),
    "STOP KILL": ((SIGSTOP, 0), (SIGKILL, 0.3)),
    "STOP TERM CONT": ((SIGSTOP, 0), (SIGTERM, 0), (SIGCONT, 0.1)),
    "TERM TERM": ((SIGTERM, 0), (SIGTERM, 0.02)),
    "USR2 TERM": ((SIGUSR2, 0), (SIGTERM, 0.05)),
    "USR1 KILL": ((SIGUSR1, 0), (SIGKILL, 0)),
    "TERM KILL": ((SIGTERM, 0), (SIGKILL, 0.05)),
}
KIND_WEIGHTS = {"KILL": 6, "TERM": 3, "USR1": 2, "USR2": 2}
RANDOM = "random time"
RANDOM_WEIGHT = 5
# Places on the way from a stop signal to the end, for a second fault there.
STOPPING = ("events", "save-half", "save-rename", "save-renamed", "index", "settle")
# Taken in this order within a run: what can only be had early comes first, what ends the run last.
EARLY, LATE = ("decode", "cache", "best-link", "best-rename"), ("settle", "finished", "disconnect")


@dataclass(frozen=True)
class Fault:
    """What is done to one start of a run.

    Attributes:
        place: a key of PLACES, or RANDOM: at a time that nothing here decides.
        target: who gets the signals: "one" (the rank that is caught), "other" (another one), or "all".
        share: 0 to 1, how far on the way that is left the place is taken; the rank likewise by `which`.
        second: a further (place, kind) on the way to the stop that this fault asks for; kind goes to "all".
    """

    kind: str
    place: str
    target: str
    world: int
    share: float
    which: float
    fresh: bool = False
    second: tuple[str, str] | None = None

    def rank(self, world: int) -> int:
        """The rank that is to be caught, of `world`."""
        place = PLACES.get(self.place)
        return 0 if place is not None and place.only_first else int(self.which * world)

    @property
    def passing(self) -> bool:
        """Whether the start goes on afterwards."""
        return KINDS[self.kind] == KINDS["STOP CONT"]


@dataclass(frozen=True)
class RunPlan:
    """One run: a spec, how it saves, and the faults of its starts; the start after the last is left alone."""

    number: int
    spec: str
    checkpoint: dict[str, Any]
    faults: tuple[Fault, ...]
    last_world: int

    def job(self) -> dict[str, Any]:
        """The job file."""
        return merged(TINY, SPECS[self.spec], {"checkpoint": self.checkpoint})


def merged(*jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Later sections laid over earlier ones, key by key."""
    result: dict[str, dict[str, Any]] = {}
    for job in jobs:
        for section, values in job.items():
            result[section] = result.get(section, {}) | values
    return result


def deal(name: str, cards: Sequence[T]) -> Iterator[T]:
    """All cards in a random order, again and again: even a short campaign sees nearly all of them."""
    for deck in itertools.count():
        shuffled = list(cards)
        random.Random(f"{name}/{deck}").shuffle(shuffled)
        yield from shuffled


def plan(seed: int, number: int, faults: int, worlds: Sequence[int], fresh_share: float) -> RunPlan:
    """The plan of run `number` (from 0); it does not depend on how many runs there are."""
    rng = random.Random(f"{seed}/run {number}")
    cards = [p for p in PLACES if max(worlds) > 1 or PLACES[p].needs != "ranks"] + [RANDOM] * RANDOM_WEIGHT
    first = number * faults
    places = list(itertools.islice(deal(f"{seed}/places", cards), first, first + faults))
    kinds = [kind for kind in KINDS for _ in range(KIND_WEIGHTS.get(kind, 1))]
    chosen = itertools.islice(deal(f"{seed}/kinds", kinds), first, first + faults)
    drawn = [_fault(rng, place, kind, worlds, fresh_share) for place, kind in zip(places, chosen, strict=True)]
    rng.shuffle(drawn)
    drawn.sort(key=lambda fault: EARLY.index(fault.place) if fault.place in EARLY else 9 + (fault.place in LATE))
    needs = {PLACES[place].needs for place in places if place != RANDOM}
    spec = "images" if "images" in needs else rng.choice([name for name in SPECS if name != "images"])
    if spec == "fp16":  # its initial scale is set in a fork only
        drawn = [replace(fault, fresh=False) for fault in drawn]
    checkpoint: dict[str, Any] = {"keep": rng.randint(1, 3)}
    checkpoint |= rng.choice(
        [{"every_steps": rng.randint(1, 5)}] * 3 + [{"every_minutes": 0.0005}, {"every_steps": 3, "every_epochs": 2}]
    )
    return RunPlan(number, spec, checkpoint, tuple(_with_what_they_need(drawn, worlds)), rng.choice(worlds))


def _fault(rng: random.Random, place: str, kind: str, worlds: Sequence[int], fresh_share: float) -> Fault:
    needed = PLACES[place].needs == "ranks" if place != RANDOM else False
    world = rng.choice([w for w in worlds if w > 1 or not needed])
    fresh = place == RANDOM and rng.random() < fresh_share
    target = rng.choice(("one", "one", "other", "all"))
    second = None
    stops = KINDS[kind][-1][0] in (SIGTERM, SIGUSR1, SIGUSR2)
    if stops and place not in LATE and not fresh and rng.random() < 0.3:
        second = (rng.choice(STOPPING), rng.choice(("KILL", "KILL", "TERM", "STOP CONT")))
    return Fault(kind, place, target, world, rng.random(), rng.random(), fresh, second)


def _with_what_they_need(faults: Sequence[Fault], worlds: Sequence[int]) -> Iterator[Fault]:
    for fault in faults:
        if fault.place in PLACES and PLACES[fault.place].needs == "row":
            # A row that no checkpoint holds is there after a kill right after it was written.
            yield Fault("KILL", "metrics-done", "all", worlds[0], 0, 0)
        yield fault


def nth(
    fault: Fault, world: int, step: int, faults_left: int, every: int | None, best: Sequence[int]
) -> tuple[str, int]:
    """The place where `fault` strikes a start that goes on from `step`, and at which time the place is passed.

    Args:
        world: the number of ranks.
        faults_left: faults still to come after this one; each is to have its share of the steps.
        every: steps between two checkpoints, if steps decide.
        best: the epochs (from 1) whose test accuracy is the best so far.
    """
    if fault.place == RANDOM:
        return RANDOM, 0
    place = PLACES[fault.place]
    steps = max(1, EPOCHS * STEPS_PER_EPOCH - step)
    epochs = max(1, EPOCHS - step // STEPS_PER_EPOCH)
    fair = max(1, min(steps, 2 * steps // (faults_left + 1)))
    if place.needs == "best":
        # Mostly the last one: after any other a better epoch would hide that best.pt had been lost.
        to_come = sum(STEPS_PER_EPOCH * epoch > step for epoch in best)
        return (fault.place, to_come if fault.share > 0.2 else 1) if to_come else ("save-rename", 1)
    if place.unit == "image":
        return fault.place, 1 + int(fault.share * 10 * sum(IMAGES.values()))
    if place.unit == "step":
        shards = SHARDS // world if fault.place == "backward" else 1
        return fault.place, 1 + int(fault.share * fair * shards)
    if place.unit == "epoch":
        return fault.place, 1 + int(fault.share * min(epochs, max(1, 2 * epochs // (faults_left + 1))))
    if place.unit == "save":
        return fault.place, 1 + int(fault.share * max(1, fair // (every or STEPS_PER_EPOCH)))
    return fault.place, 1
