"""What the pieces of the GPU benchmark share: engines, their steps, and the loop that steps are timed in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Row, alternate, meets, quartiles, ratios
from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.randomness import permutation
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.checkpoints.format import to_host
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, resolve_amp

GRAPHS = ("off", "on")  # of train.graph; on a CPU both are off
# By a word of the GPU's name, since they follow from its bandwidth (NOTES.md).
RATE_TARGETS = {"H200": ">= 30000 img/s", "H100": ">= 24000 img/s"}
TRAINING_TARGETS = {"H200": "< 14 min"}
SAME = "<= 0"  # what is wrong, or differs
TINY_MODEL = {"width_multiplier": 0.0625, "blocks": [1, 1, 1]}


class Bench:
    """Where and how large to measure.

    Args:
        quick: a tiny model, tiny batches and few repetitions: a rehearsal on a CPU, whose figures mean nothing.

    Attributes:
        gpu: its name; empty on a CPU.
        batches: global batch sizes, the product's default first.
        seconds: of one repetition.
        switches: PyTorch's own, before any engine has set them.
    """

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick, self.cuda = device, quick, device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if self.cuda else ""
        self.batches = (16, 24, 32, 40) if quick else (128, 256, 512, 1024)
        self.repetitions, self.seconds = (2, 0.02) if quick else (7, 0.3)
        self.switches = read_switches()

    def plain_spec(self, batch: int, images: int = 256, **train: Any) -> dict[str, Any]:
        """The report's recipe on so many images as plain values, with `train` laid over that section."""
        common = {"batch_size": batch, "shards": 1, "device": self.device.type, "cpu_threads": 1}
        return {
            "model": TINY_MODEL if self.quick else {},
            "train": common | train,
            "data": {"target": "benchmarks.gpu_runs:images", "args": {"count": images}},
            "resources": {"gpus_per_node": int(self.cuda)},
        }

    @cached_property
    def data(self) -> Dataset:
        """Uniform noise, made on the device. Of each size in `batches` an epoch has whole ones only."""
        torch.manual_seed(0)
        tensors: list[torch.Tensor] = []
        for count in (480 if self.quick else 51_200, 16):
            tensors.append(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=self.device))
            tensors.append(torch.randint(10, (count,), device=self.device))
        return Dataset(*tensors)

    def engine(self, batch: int, images: int | None = None, **train: Any) -> Engine:
        """The product's engine for that spec, PyTorch's switches set as it sets them.

        Args:
            images: only the first ones.
        """
        spec = from_plain(self.plain_spec(batch, **train))
        self.configure(spec)
        data = Dataset(*(t[:images] for t in self.data.tensors.values()))
        return Engine(
            spec, self.device, ShardLayout(spec.train.shards or 1, 1, 0), data, resolve_amp(spec, self.device)
        )

    def configure(self, spec: Spec) -> None:
        """PyTorch's switches as a fresh process of that spec has them."""
        set_switches(*self.switches)
        configure_torch(spec, self.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def rates(self, engines: Mapping[str, Engine]) -> dict[str, list[float]]:
        """Images a second of the steps of each, repetition by repetition in turns."""
        works = {name: Steps(self, engine).calibrate() for name, engine in engines.items()}
        seconds = alternate(works, self.repetitions, wait=self.wait)
        return {name: work.rates(seconds[name]) for name, work in works.items()}


def read_switches() -> tuple[bool, bool, bool, bool, int]:
    """The switches of PyTorch that `configure_torch` sets."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    exact = torch.are_deterministic_algorithms_enabled()
    return exact, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, torch.get_num_threads()


def set_switches(exact: bool, benchmark: bool, cudnn_tf32: bool, matmul_tf32: bool, threads: int) -> None:
    """Set what `read_switches` has read."""
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, cudnn_tf32
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.set_num_threads(threads)


class Steps:
    """Steps of an engine, as the training loop takes them, one epoch after the other.

    Attributes:
        done: steps so far.
        count: steps of one repetition that is timed.
    """

    def __init__(self, bench: Bench, engine: Engine) -> None:
        self.bench, self.engine, self.done, self.count = bench, engine, 0, 1
        self._order = torch.empty(0)

    def take(self, count: int = 1) -> None:
        """Take some steps."""
        engine = self.engine
        for _ in range(count):
            epoch, step = divmod(self.done, engine.steps_per_epoch)
            if step == 0:
                images = len(engine.data.train_images)
                self._order = permutation(engine.spec.train.seed, epoch, images).to(engine.device)
            engine.step(epoch, step, self.done, self._order)
            self.done += 1

    def __call__(self) -> None:
        """Take `count` steps under the switches of this engine."""
        self.bench.configure(self.engine.spec)
        self.take(self.count)

    def calibrate(self) -> Steps:
        """Warm up, and choose `count` so that it takes about bench.seconds."""
        for steps in (2 if self.bench.quick else 12, 2):
            self.bench.wait()
            began = time.perf_counter()
            self.take(steps)
            self.bench.wait()
        self.count = max(1, round(2 * self.bench.seconds / (time.perf_counter() - began)))
        return self

    def rates(self, seconds: Sequence[float]) -> list[float]:
        """Images a second."""
        return [self.engine.spec.train.batch_size * self.count / s for s in seconds]


def target_of(targets: Mapping[str, str], gpu: str) -> str:
    """The target for that GPU; empty if there is none."""
    return next((target for word, target in targets.items() if word in gpu), "")


def compared(what: str, ours: Sequence[float], peer: str, theirs: Sequence[float], target: str = "") -> Row:
    """A row of images a second against another's, which took turns; the target is that of their ratio."""
    ratio = ratios(ours, theirs)
    met = meets(ratio[1], target) if target else None
    return Row("gpu", what, "img/s", quartiles(ours), peer, quartiles(theirs), ratio, target, met)


def figure(what: str, unit: str, values: Sequence[float], target: str = "", note: str = "") -> Row:
    """A row of one figure, with or without a target."""
    ours = quartiles(values)
    return Row("gpu", what, unit, ours, target=target, met=meets(ours[1], target) if target else None, note=note)


def same(what: str, one: Engine, other: Engine, target: str = SAME) -> Row:
    """A row of a check: how many tensors and numbers of their states differ in any bit."""
    states = [_state(engine) for engine in (one, other)]
    differing = sum(digest(a) != digest(b) for a, b in zip(*states, strict=True))
    sums = " and ".join(dict.fromkeys(digest(state)[:16] for state in states))
    return figure(f"{what}: tensors that differ", "", [differing], target, f"of {len(states[0])}; sha256 {sums}")


def _state(engine: Engine) -> list[Any]:
    leaves = tree_leaves(to_host({**engine.state(), "sums": engine.epoch_sums(), "bad_step": engine.bad_step}))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float)]
