"""Shared by the tests: tiny specs and data sets, and a pool of real processes that form gloo groups."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
import torch.distributed as dist

from cifar_hpc.config.io import from_plain, merge, to_plain
from cifar_hpc.config.spec import ModelSpec, Spec
from cifar_hpc.data.datasets import CIFAR10, Dataset
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.models.network import build_network
from cifar_hpc.runs.logs import metrics_text
from cifar_hpc.training.checkpoints.format import TrainingState, to_host
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch
from cifar_hpc.training.optim import build_optimizer

PROJECT, TESTS = nursery.PROJECT, nursery.TESTS  # their folders
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # of tests that compare what they compute
INFO = DatasetInfo(CIFAR10, 32)
TINY: dict[str, Any] = {
    "model": {"width_multiplier": 0.0625, "blocks": [1, 1, 1], "dropout": 0.1},
    "train": {"epochs": 2, "batch_size": 32, "shards": 4, "cpu_threads": 1, "device": "cpu", "amp": "fp32"},
    "data": {"source": "synthetic", "train_size": 264, "test_size": 100},
    "lookahead": {"bn_batches": 3},
    "resources": {"gpus_per_node": 0},
}
# What our recipes, jobs/improved_resnet_plus.yaml and _fast.yaml, have beside the report's.
PLUS: dict[str, Any] = {
    "optimizer": {"nesterov": True, "decay_all": False, "weight_decay": 0.01, "bias_factor": 4},
    "lookahead": {"enabled": False, "bn_batches": 2},
    "ema": {"decay": 0.9},
    "schedule": {"name": "linear", "per": "step", "warmup_epochs": 0.5},
    "augment": {"trivial": True, "rotation": 0, "hue": 0, "erasing": 0.1},
    "mixing": {"mixup": 0.2, "cutmix": 1.0, "probability": 0.8},
    "resizing": {"initial": 16},
}
ANSWER_SECONDS = 120  # only bounds how long a hang lasts


def tiny_spec(**sections: dict[str, Any]) -> Spec:
    """The tiny spec, with `section={key: value}` laid over it."""
    return from_plain(merge(TINY, sections))


def build_model(spec: ModelSpec, seed: int) -> ImprovedResNet:
    """The built-in network for CIFAR-10."""
    network = build_network(spec, INFO, seed, PROJECT)
    assert isinstance(network, ImprovedResNet)
    return network


def tiny_engine(spec: Spec, rank: int = 0, world: int = 1) -> Engine:
    """An engine on the CPU with the spec's synthetic images."""
    configure_torch(spec, CPU)
    data = Dataset(*make_synthetic(spec.data.train_size or 64, spec.data.test_size or 64))
    return Engine(spec, CPU, ShardLayout(spec.train.shards or world, world, rank), data, spec.train.amp)


def take_steps(engine: Engine, first: int, last: int, epoch: int = 0) -> None:
    """Take steps `first` to `last` - 1 of an epoch that visits the images in the order in which they are."""
    order = torch.arange(len(engine.data.train_images))
    for step in range(first, last):
        engine.step(epoch, step, epoch * engine.steps_per_epoch + step, order)


ENVIRONMENT = {"amp": "fp32", "cuda": None, "device": "cpu", "torch": "2"}
# A run of one block without Lookahead, whose largest weights lie in the middle of the file.
BLANK = tiny_spec(
    model={"width_multiplier": 1.0, "stem_width": 16, "blocks": [1], "widths": [32]},
    lookahead={"enabled": False},
    train={"shards": 1},
)


def blank_state(step: int = 0, epoch: int = 0, *, number: float = 0.0, **values: Any) -> TrainingState:
    """A training state of BLANK as a checkpoint may hold it, all of whose weights are `number`."""
    with torch.device("meta"):
        model = ImprovedResNet(BLANK.model)
    within = values.get("step_in_epoch", 0 if epoch else step)
    each = (step - within) // epoch if epoch else 0
    blank = {
        "spec": to_plain(BLANK),
        "step": step,
        "epoch": epoch,
        "step_in_epoch": within,
        "epoch_seconds": 0.0,
        "best": {"epoch": 0, "test_accuracy": -1.0},
        "model": {name: torch.full(p.shape, float(number)) for name, p in model.named_parameters()},
        "buffers": {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in model.named_buffers()},
        "optimizer": build_optimizer(model, BLANK).state_dict(),
        "scaler": {},
        "updates": 0,
        "slow_buffers": None,
        "sums": torch.zeros(1, 2, dtype=torch.float64),
        "history": metrics_text([{"epoch": n, "step": n * each} for n in range(1, epoch + 1)]),
        "environment": ENVIRONMENT,
    }
    return TrainingState(**(blank | values))


def snapshot(engine: Engine) -> TrainingState:
    """What a checkpoint holds of an engine."""
    fields = {"spec": to_plain(engine.spec), **engine.state(), "sums": engine.epoch_sums()}
    return blank_state(engine.updates, **to_host(fields))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Make it an error that an operation waits for the GPU; nothing does on a CPU."""
    if device == "cpu":
        yield
        return
    try:
        with warnings.catch_warnings():
            # Once in a process PyTorch says so of this mode; pytest would make it an error, and leave the mode set.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Ranks:
    """Real processes that are started once and then run functions together, as the ranks of a gloo group."""

    def __init__(self, size: int) -> None:
        environment = {**os.environ, **nursery.THREADS, "GLOO_SOCKET_IFNAME": "lo"}
        self._pipes: list[Connection] = []
        self._processes = []
        self._folder = tempfile.TemporaryDirectory()
        with Listener(f"{self._folder.name}/socket", "AF_UNIX") as listener:
            for rank in range(size):
                out = Path(self._folder.name) / f"{rank}.out"
                start = nursery.Start(_serve, (rank, str(listener.address)), environment, out)
                self._processes += nursery.start([start])
                self._pipes.append(listener.accept())

    def run(self, world: int, function: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
        """What `function(rank, world, *args)` returned on each rank; an error of any rank fails the test.

        Args:
            function: at the top level of a module; its result is to be of plain values.
            group: form the default process group around it.
        """
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes[:world]:
                pipe.send((world, function, args, f"file://{folder}/store" if group else None))
            answers = []
            for rank, pipe in enumerate(self._pipes[:world]):
                assert pipe.poll(ANSWER_SECONDS), f"rank {rank} does not answer"
                answers.append(pipe.recv())
        problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(answers) if problem]
        assert not problems, "\n".join(problems)
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.wait(10)
        self._folder.cleanup()


def _serve(rank: int, address: str) -> None:
    pipe = Client(address)
    while True:
        try:
            world, function, args, store = pipe.recv()
        except EOFError:
            os._exit(0)
        problem = result = None
        try:
            if store:
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            result = function(rank, world, *args)
        except Exception:
            problem = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send((problem, result))


def end_processes(root: Path) -> None:
    """Kill every process that was started with CIFAR_HPC_ROOT=`root`: what a failed test has left running."""
    mine = f"CIFAR_HPC_ROOT={root}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mine in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files anywhere below `folder`."""
    return [p for p in folder.rglob("*") if p.suffix == ".tmp"]
