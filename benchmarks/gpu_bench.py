"""What the pieces of the GPU benchmark share: engines, the loop that they are timed in, and what a piece leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, environment, meets, quartiles, ratios
from cifar_hpc.config.io import from_plain, merge
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.randomness import permutation
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, resolve_amp

PART = "gpu"
TINY_MODEL = {"width_multiplier": 0.0625, "blocks": [1, 1, 1]}


@dataclass
class Report:
    """What a piece has found so far; written after each addition, so that a piece that is killed has not lost it."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    text: str = ""

    def add(self, *rows: Row, text: str = "") -> None:
        """Append rows, and a paragraph of Markdown."""
        self.rows += rows
        self.text += f"{text}\n\n" if text else ""
        content = {"environment": environment(), "rows": [asdict(row) for row in self.rows], "text": self.text}
        self.path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Bench:
    """Where and how large to measure.

    Args:
        quick: a tiny model, tiny batches and few repetitions: a rehearsal on a CPU, whose figures mean nothing.
        images: folder of images (train/, test/) instead of synthetic ones.
    """

    device: torch.device
    quick: bool
    images: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batches(self) -> tuple[int, ...]:
        """Global batch sizes, the product's default first."""
        return (16, 32) if self.quick else (128, 256, 512, 1024)

    @property
    def repetitions(self) -> int:
        return 2 if self.quick else 7

    @property
    def seconds(self) -> float:
        """Of one repetition."""
        return 0.02 if self.quick else 0.3

    def plain_spec(self, batch: int, **sections: Any) -> dict[str, Any]:
        """The recipe's spec as plain values, `sections` laid over it."""
        data: dict[str, Any] = {"source": "synthetic", "train_size": 256 if self.quick else 10_000, "test_size": 100}
        if self.images is not None:
            data = {"source": "folder", "root": str(self.images), "train_size": 256 if self.quick else None}
        base = {
            "model": TINY_MODEL if self.quick else {},
            "train": {"batch_size": batch, "shards": 1, "device": self.device.type, "cpu_threads": 1},
            "data": data,
            "resources": {"gpus_per_node": int(self.cuda)},
        }
        return merge(base, sections)

    @cached_property
    def data(self) -> Dataset:
        """The images on the device, loaded once."""
        return load_dataset(from_plain(self.plain_spec(self.batches[0])).data, Path.cwd()).to(self.device)

    def engine(self, batch: int, **sections: Any) -> Engine:
        """The product's engine for that spec, PyTorch's switches set as it sets them."""
        spec = from_plain(self.plain_spec(batch, **sections))
        self.configure(spec)
        return Engine(spec, self.device, ShardLayout(1, 1, 0), self.data, resolve_amp(spec, self.device))

    def configure(self, spec: Spec) -> None:
        """PyTorch's switches as a fresh process of that spec has them."""
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        configure_torch(spec, self.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Steps:
    """Steps of an engine one after the other, as the training loop takes them; whole batches only."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.done = engine, 0
        self.batch, images = engine.spec.train.batch_size, len(engine.data.train_images)
        self.in_epoch = images // self.batch
        self._order = permutation(engine.spec.train.seed, 0, images).to(engine.device)

    def __call__(self) -> None:
        epoch, step = divmod(self.done, self.in_epoch)
        self.engine.step(epoch, step, self.done, self._order)
        self.done += 1


@dataclass
class Timed:
    """Something that takes steps, and how many of them make up one repetition."""

    name: str
    batch: int
    step: Callable[[], object]
    switch: Callable[[], None] = lambda: None
    steps: int = 1

    def __call__(self) -> None:
        self.switch()
        for _ in range(self.steps):
            self.step()

    def calibrate(self, bench: Bench, warm_up: int = 5) -> Timed:
        """Choose `steps` so that a repetition takes about bench.seconds. Warms up first."""
        for self.steps in (warm_up, 2):
            bench.wait()
            began = time.perf_counter()
            self()
            bench.wait()
        self.steps = max(1, round(2 * bench.seconds / (time.perf_counter() - began)))
        return self

    def rates(self, seconds: Sequence[float]) -> list[float]:
        """Images a second."""
        return [self.batch * self.steps / s for s in seconds]


def timed_engine(bench: Bench, name: str, engine: Engine) -> Timed:
    """An engine's steps, under its own switches."""
    return Timed(name, engine.spec.train.batch_size, Steps(engine), lambda: bench.configure(engine.spec))


def compared(what: str, ours: list[float], peer: str, theirs: list[float], target: str = "", note: str = "") -> Row:
    """A row of images a second against a peer's, alternating repetition by repetition."""
    ratio = ratios(ours, theirs)
    met = meets(ratio[1], target) if target else None
    return Row(PART, what, "img/s", quartiles(ours), peer, quartiles(theirs), ratio, target, met, note)


def figure(what: str, unit: str, values: Sequence[float], target: str = "", note: str = "") -> Row:
    """A row of one figure, with or without a target."""
    ours = quartiles(values)
    return Row(PART, what, unit, ours, target=target, met=meets(ours[1], target) if target else None, note=note)


def wrong(what: str, count: int, note: str = "") -> Row:
    """A row of a check: the number of things that are wrong."""
    return figure(what, "", [count], "<= 0", note)


def differing(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> int:
    """How many of the tensors differ in any bit."""
    return sum(not torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def state_tensors(engine: Engine) -> list[torch.Tensor]:
    """Weights, momentum, slow weights and BatchNorm's statistics, by copy."""
    state = engine.state()
    leaves = torch.utils._pytree.tree_leaves([state["model"], state["buffers"], state["optimizer"]])
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
