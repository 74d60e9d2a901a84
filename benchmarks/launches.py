"""Operations of a training step that launch a kernel on a GPU, their bytes and FLOPs; counted without a GPU.

    python -m benchmarks.launches [--batch 128] [--job FILE]

Fake tensors, which have a shape and no values, stand for tensors on the GPU: the product's code is shown the device
`cuda`, so that it takes its path for GPUs, and each operator on them is recorded below autograd and autocast. Whatever
would wait for the device raises an error, since a fake tensor has no values.

An operation is one call of an operator that is neither a view nor an allocation. That is the least number of launches:
a `_foreach_` operator over all parameters counts as one and is one to three kernels, a convolution's backward pass is
two or more, a BatchNorm one to three. A copy from the host counts as one. Bytes: each operand read once, each result
written once. FLOPs: of convolutions and matrix products, as FlopCounterMode counts them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.contestants import train_epoch, train_ours
from benchmarks.measure import ROOT
from cifar_hpc.config.io import load_spec
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.errors import SpecError
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine

STEPS = 32  # batches of 128 images are augmented at once
AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER, SUMS = "augmentation", "forward", "backward", "optimizer", "loss and sums"
PARTS = (AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER, SUMS)
GPU = torch.device("cuda", 99)  # no machine has it, so nothing that is kept for it meets a real one
COPY = "copy from the host"
# By the innermost module that is listed, and in the engine by the name of the function.
_MODULES = {
    "cifar_hpc.data": AUGMENTATION,
    "cifar_hpc.models": FORWARD,
    "torch.nn.modules": FORWARD,
    "cifar_hpc.training.optim": OPTIMIZER,
    "torch.optim": OPTIMIZER,
}
_ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "resize")
_OVERWRITES = ("copy_", "fill_", "zero_")  # their first operand is not read
_LOOKUPS = ("index", "index_select", "gather", "take")  # read as much of their first operand as they give


@dataclass(frozen=True)
class Operation:
    """One call of an operator that does work."""

    name: str
    part: str
    bytes: int
    flops: int


class Recorder(TorchDispatchMode):
    """Records the operators on tensors of a class while it is active."""

    def __init__(self, kind: type[Tensor] = Tensor) -> None:
        super().__init__()
        self.kind, self.inside = kind, False
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and record it."""
        if self.inside:  # what a fake tensor's operator calls
            return func(*args, **(kwargs or {}))
        self.inside = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.inside = False
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name.startswith(_ALLOCATIONS):
            return result
        first, others = _tensors(args[:1]), _tensors((args[1:], kwargs))
        results = [t for t in _tensors(result) if isinstance(t, self.kind)]
        if results or any(isinstance(t, self.kind) for t in (*first, *others)):
            for host in (*first, *others):
                if not isinstance(host, self.kind) and host.dim() > 0:
                    self.add(COPY, _bytes(host))
            read = results if name in _LOOKUPS else [] if name.endswith(_OVERWRITES) else first
            # _foreach_add_ and its like return nothing.
            size = sum(map(_bytes, [*read, *others, *(results or first)]))
            flops = flop_registry.get(func.overloadpacket)
            self.add(name, size, flops(*args, **(kwargs or {}), out_val=result) if flops else 0)
        return result

    def add(self, name: str, size: int, flops: int = 0) -> None:
        """Record an operation of the part that calls."""
        self.operations.append(Operation(name, _part(), size, flops))


class FakeGPU(TorchFunctionMode):
    """Shows fake tensors as tensors on GPU, and makes those that are asked for there, while it is active.

    To PyTorch they are on the CPU: without CUDA, autograd's backward pass finds no stream of a GPU.
    """

    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # one: the product keeps tables for each device

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch."""
        kwargs = kwargs or {}
        named = any(isinstance(value, torch.device) and value == GPU for value in (*args, *kwargs.values()))
        if not named or func in (torch._C._nn._parse_to, torch.device):
            return func(*args, **kwargs)
        if func is Tensor.to and not isinstance(args[0], FakeTensor):
            self._recorder.add(COPY, _bytes(args[0]))
            args = (self.fakes.from_tensor(args[0]), *args[1:])
        elif func in (torch.tensor, torch.as_tensor):
            self._recorder.add(COPY, 0)
        cpu = torch.device("cpu")
        args = [cpu if isinstance(value, torch.device) else value for value in args]
        kwargs = {name: cpu if isinstance(value, torch.device) else value for name, value in kwargs.items()}
        with self.fakes, self._recorder:
            return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[Recorder]:
    """Record what is done on GPU, in the context."""
    recorder = Recorder(FakeTensor)
    autocast, own = torch.autocast, FakeTensor.device
    device = property(lambda tensor: own.__get__(tensor) if recorder.inside else GPU)
    optimizers = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim has deleted the name
    kinds = [*optimizers._foreach_supported_types, FakeTensor]
    with (
        mock.patch.object(FakeTensor, "device", device),
        mock.patch.object(optimizers, "_foreach_supported_types", kinds),
        mock.patch.object(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs)),
        FakeGPU(recorder),
        recorder,
    ):
        yield recorder


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; what is expanded counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _part() -> str:
    """The part of a step whose code runs."""
    if torch._C._current_graph_task_id() != -1:
        return BACKWARD
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == Engine.__module__ and "augment" in frame.f_code.co_name:
            return AUGMENTATION
        for prefix, part in _MODULES.items():
            if module.startswith(prefix):
                return part
        frame = frame.f_back
    return SUMS


def record(spec: Spec, steps: int = STEPS) -> list[Operation]:
    """Record what one GPU does in an epoch of `steps` steps, after a step of another epoch, which makes its tables.

    Raises:
        SpecError: for train.compile, which fuses operations.
    """
    if spec.train.compile:
        raise SpecError("train.compile: true is not allowed; allowed: false, since fused operations are not counted.")
    batch, shards = spec.train.batch_size, spec.train.shards or 1
    images, size = steps * batch, spec.data.size
    with fake_gpu() as recorder:
        data = Dataset(
            torch.zeros(images, 3, size, size, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64),
            torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        amp = "bf16" if spec.train.amp == "auto" else spec.train.amp
        engine = Engine(spec, GPU, ShardLayout(shards, 1, 0), data.to(GPU), amp)
        engine.graphs = None  # a CUDA graph holds the same operations
        train_epoch(engine, 0, steps=1)
        recorder.operations.clear()
        train_epoch(engine, spec.train.epochs - 1)  # with images of full size
    return recorder.operations


def record_on_cpu(batch: int, threads: int, amp: str) -> list[Operation]:
    """Record the second step of ours as it runs on this CPU, on its path for CPUs."""
    torch.set_num_threads(threads)
    ends: list[int] = []
    with Recorder() as recorder:
        train_ours(2 * batch, lambda: ends.append(len(recorder.operations)), batch, threads, epochs=1, amp=amp)
    return recorder.operations[slice(*ends)]


def count(spec: Spec, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Count what a step on one GPU does, as the mean over `steps` steps.

    Returns:
        For each of PARTS: its "operations" a step, and its "bytes" and "flops" an image.
    """
    found = {part: {"operations": 0.0, "bytes": 0.0, "flops": 0.0} for part in PARTS}
    for one in record(spec, steps):
        found[one.part]["operations"] += 1 / steps
        found[one.part]["bytes"] += one.bytes / (steps * spec.train.batch_size)
        found[one.part]["flops"] += one.flops / (steps * spec.train.batch_size)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the parts and their sum as a table of Markdown."""
    whole = {key: sum(part[key] for part in found.values()) for key in ("operations", "bytes", "flops")}
    lines = ["| part          | operations a step | MB an image | GFLOP an image |"]
    lines += ["|---------------|-------------------|-------------|----------------|"]
    for name, part in {**found, "all": whole}.items():
        megabytes, gigaflops = part["bytes"] / 1e6, part["flops"] / 1e9
        lines.append(f"| {name:<13} | {part['operations']:>17,.1f} | {megabytes:>11,.2f} | {gigaflops:>14,.3f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, metavar="IMAGES", help="default: that of the job")
    parser.add_argument("--job", type=Path, metavar="FILE", help="default: the report's recipe")
    options = parser.parse_args(argv)
    batch = [] if options.batch is None else [f"train.batch_size={options.batch}"]
    try:
        found = count(load_spec(options.job or ROOT / "jobs" / "improved_resnet.yaml", batch))
    except SpecError as error:
        parser.error(str(error))
    print(table(found))


if __name__ == "__main__":
    main()
