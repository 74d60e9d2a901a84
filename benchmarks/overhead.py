"""What a run does around the bare steps: agreeing to stop, logging, metrics, and gradients added in a fixed order.

A few parts in a hundred of a step drown in the noise of whole steps, so each part is timed by itself, many times over,
and divided by the time of a whole step: the full model at batch 128 on the CPU, with one process and with two that
share the cores. Of the fixed order counts what it takes beyond DDP's own all-reduce of the same buckets.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import reduction
from benchmarks.measure import Row, meets, quartiles, run_part
from benchmarks.running import full_trainer, train
from cifar_hpc.training.distributed.group import Request
from cifar_hpc.training.engine import NO_BAD_STEP
from cifar_hpc.training.trainer import Trainer

PART = "overhead"
BATCH, QUICK_BATCH = 128, 16
TARGETS = {1: "< 1 %", 2: "< 3 %"}


def measure(quick: bool) -> list[Row]:
    """Rows of the part "overhead"."""
    rows = []
    for world, target in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_rank, (world, folder, quick), nprocs=world, start_method="spawn")
            found = json.loads(Path(folder, "found.json").read_text())
        rows += rows_of(world, target, **found)
    return rows


def rows_of(world: int, target: str, step: list[float], parts: dict[str, list[float]], setting: str) -> list[Row]:
    """The share of all parts together, and the time of each.

    Args:
        step: seconds of whole steps.
        parts: for each part, seconds that it adds to a step, one figure a round.
        setting: batch and precision.
    """
    where = f"{world} process" + "es" * (world > 1)
    usual = quartiles(step)[1]
    shares = quartiles([100 * sum(one_round) / usual for one_round in zip(*parts.values(), strict=True)])
    note = f"of a step of {usual:.3g} s, {setting}"
    total = Row(PART, f"around a step, {where}", "%", shares, target=target, met=meets(shares[1], target), note=note)
    return [total, *(Row(PART, f"{name}, {where}", "ms", quartiles([1e3 * s for s in parts[name]])) for name in parts)]


def _rank(rank: int, world: int, folder: str, quick: bool) -> None:
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    trainer = full_trainer(Path(folder), QUICK_BATCH if quick else BATCH, rank, world)
    steps, rounds = (1, 2) if quick else (6, 15)
    train(trainer, 1 if quick else 2)
    seconds = [_seconds(lambda: train(trainer, 1), 1) for _ in range(steps)]
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, one in _parts(trainer, statistics.median(seconds)).items():
            found.setdefault(name, []).append(one)
    if world > 1:
        found["fixed order beyond all-reduce"] = reduction.communication(rank, world, trainer.engine.device, rounds)[
            "extra_seconds"
        ]
    if rank == 0:
        setting = f"batch {trainer.spec.train.batch_size}, {trainer.engine.amp}"
        Path(folder, "found.json").write_text(json.dumps({"step": seconds, "parts": found, "setting": setting}))
    if world > 1:
        dist.barrier()
        del trainer
        dist.destroy_process_group()


def _parts(trainer: Trainer, step: float) -> dict[str, float]:
    """Seconds that each part adds to a step, which itself takes `step` seconds."""

    def agree() -> None:
        trainer.context.heart.beat(f"step {trainer.position.step}", trainer.position.step)
        now = time.monotonic()
        trainer._measure(step, now)
        trainer.agreement.after_step(trainer._decide(now))

    def no_line() -> None:
        trainer._last_line = time.monotonic()
        trainer._act(Request.GO_ON)

    def line() -> None:
        trainer._last_line = time.monotonic() - trainer.spec.train.log_seconds
        trainer._last_line_images = trainer._images_done() - 1
        trainer._act(Request.GO_ON)

    if trainer.agreement.world_size > 1:
        dist.barrier()
    lines_a_step = min(1.0, step / trainer.spec.train.log_seconds)
    return {
        "stop agreement": _seconds(agree, 100),
        "logging": _seconds(no_line, 100) + lines_a_step * _seconds(line, 10),
        "metrics": _seconds(_metrics(trainer), 100),
    }


def _metrics(trainer: Trainer) -> Callable[[], Any]:
    """What Engine._shard_gradient does for them after each backward pass."""
    engine, shard = trainer.engine, trainer.engine.layout.mine[0]
    images = engine.spec.train.batch_size // engine.layout.shards
    logits, labels = torch.randn(images, 10, dtype=torch.bfloat16), torch.zeros(images, dtype=torch.int64)
    loss = logits.float().sum()

    @torch.no_grad()
    def metrics() -> None:
        finite = torch.isfinite(loss)
        engine.sums[shard, 0] += torch.where(finite, loss, 0).double()
        engine.sums[shard, 1] += (logits.argmax(1) == labels).sum()
        engine.bad_step = torch.minimum(engine.bad_step, torch.where(finite, NO_BAD_STEP, 1))

    return metrics


def _seconds(work: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    run_part(measure, __doc__)
