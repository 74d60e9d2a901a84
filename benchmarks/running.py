"""A trainer of the full model on the CPU, as a run has it, for parts that measure what happens around its steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cifar_hpc.config.io import from_plain
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.runs.history import Losses
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.checkpoints.interval import CheckpointPacer
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.group import Agreement
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, describe_environment, resolve_amp
from cifar_hpc.training.process import Launch, StopFlag
from cifar_hpc.training.trainer import Trainer

CORES = 2


def full_trainer(folder: Path, batch: int, rank: int = 0, world: int = 1) -> Trainer:
    """A trainer over a few synthetic images, one shard a rank, which share the cores. Its run stands in `folder`."""
    spec = from_plain(
        {
            "train": {"shards": world, "batch_size": batch, "cpu_threads": CORES // world, "device": "cpu"},
            "data": {"source": "synthetic"},
            "resources": {"gpus_per_node": 0},
        }
    )
    device = torch.device("cpu")
    configure_torch(spec, device)
    data = Dataset(*make_synthetic(2 * batch, 16))
    return trainer_around(
        Engine(spec, device, ShardLayout(world, world, rank), data, resolve_amp(spec, device)), folder
    )


def trainer_around(engine: Engine, folder: Path) -> Trainer:
    """A trainer of that engine. Its run stands in `folder`."""
    spec, rank, world = engine.spec, engine.layout.rank, engine.layout.world_size
    paths = RunPaths(folder, "run")
    paths.create()
    context = Context(paths, spec, Launch(rank, world, rank), StopFlag())
    store = CheckpointStore(paths.checkpoints, 3, lambda event: None, _fail) if rank == 0 else None
    trainer = Trainer(engine, context, Agreement(world, lag=0), store, describe_environment(spec, engine.device))
    if store is not None:
        trainer.pacer = CheckpointPacer(Losses(), context.log.line, time.monotonic())
    return trainer


def train(trainer: Trainer, steps: int) -> None:
    """So many steps, over the same images again and again."""
    position, batch = trainer.position, trainer.spec.train.batch_size
    for _ in range(steps):
        rows = torch.arange(batch) + position.step % trainer.engine.steps_per_epoch * batch
        trainer.engine.step(0, position.step_in_epoch, position.step, rows)
        position.step += 1


def _fail(text: str) -> None:
    raise RuntimeError(text)
