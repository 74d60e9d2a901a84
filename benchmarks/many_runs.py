"""A folder of runs as weeks of work leave it: finished, failed, cancelled, killed, running, queued, never started.

Of each run there is what `status` looks at: spec.yaml, metrics.jsonl, events.jsonl with many requeues, train.log (its
first lines only) and run.lock; and a `squeue` that answers for the runs that have a job.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_hpc.config.io import to_yaml
from cifar_hpc.config.spec import Spec

EPOCHS, STEPS = 400, 391
TIMELINES = 20  # different courses; each run is one of them up to some epoch
DAY = "2026-01-01T00:00:00.000Z"
LOG = b"2026-01-01 00:00:00 epoch 1/400 step 100/391 (total 100)  loss 1.9010  acc 40.01%  lr 0.050000  9,000.1 img/s\n"
# What the runs are doing, in twentieths.
KINDS = (
    *["finished"] * 10,
    *["failed"] * 2,
    *["cancelled"] * 2,
    *["killed"] * 2,
    "running",
    "requeued",
    "queued",
    "new",
)
LAST_WORDS: dict[str, dict[str, Any]] = {
    "failed": {"event": "failed", "step": 1, "error": "RunFailedError: the loss is NaN", "cause": "raised", "rank": 0},
    "cancelled": {"event": "cancelled", "by": "somebody"},
    "requeued": {"event": "requeued", "reason": "preemption"},
}


@dataclass
class Timeline:
    """The two logs of a run that is requeued now and then; `cuts[e]` is where each of them stands after epoch e."""

    events: bytes = b""
    metrics: bytes = b""
    cuts: list[tuple[int, int]] = field(default_factory=list)


def make_runs(root: Path, count: int) -> Path:
    """Make `count` runs under `root`; returns a folder for PATH that holds their squeue."""
    timelines = [_timeline(seed) for seed in range(TIMELINES)]
    spec, queue = to_yaml(Spec(), "The frozen spec of run {run}. Every start of the run reads it.").encode(), []
    for number in range(count):
        kind, name = KINDS[number % len(KINDS)], _name(number)
        logs = root / "logs" / name
        logs.mkdir(parents=True)
        changed = spec.replace(b"{run}", name.encode()).replace(b"\n  seed: 0\n", b"\n  seed: %d\n" % number)
        (logs / "spec.yaml").write_bytes(changed)
        if kind != "new":
            _write_logs(logs, kind, timelines[number % len(timelines)], random.Random(number).randrange(EPOCHS))
        state = {"running": "RUNNING|None", "requeued": "PENDING|BeginTime", "queued": "PENDING|Priority"}.get(kind)
        if state:
            queue.append(f"{number}|{name}|{state}|{DAY[:19]}|node{number}|gpu|(null)|{logs}/code/0")
    return _squeue(root, queue)


def append_to_the_running(root: Path, count: int) -> None:
    """Every run that is running writes an event, as it would between two looks; of `count` runs."""
    for number in range(count):
        if KINDS[number % len(KINDS)] == "running":
            with (root / "logs" / _name(number) / "events.jsonl").open("ab") as file:
                file.write(_line(_checkpoint(number, 1, 1)))


def _name(number: int) -> str:
    return f"improved_resnet-{number * 2654435761 % 2**32:08x}"


def _write_logs(logs: Path, kind: str, timeline: Timeline, epoch: int) -> None:
    if kind == "queued":
        (logs / "events.jsonl").write_bytes(_line(_event("submitted", scheduler="slurm")))
        return
    epoch = EPOCHS if kind == "finished" else epoch
    of_events, of_metrics = timeline.cuts[epoch]
    last = {"event": "finished", "epoch": epoch, "test_accuracy": 95.0} if kind == "finished" else LAST_WORDS.get(kind)
    words = _line(_event(**last)) if last else b""
    (logs / "events.jsonl").write_bytes(timeline.events[:of_events] + words)
    (logs / "metrics.jsonl").write_bytes(timeline.metrics[:of_metrics])
    (logs / "train.log").write_bytes(LOG * 20)
    (logs / "run.lock").write_bytes(b'{"host": "node1", "pid": 4242, "job_id": "17"}')


def _timeline(seed: int) -> Timeline:
    chance, result = random.Random(seed), Timeline()
    events, metrics = [_event("submitted", scheduler="slurm"), _start("started", 0)], []
    restart, sizes = 0, [0, 0]
    for epoch in range(EPOCHS + 1):
        if epoch:
            row = _row(chance, epoch, restart)
            metrics.append(row)
            events += [_event("evaluated", **{k: row[k] for k in ("epoch", "step", "test_accuracy", "test_loss")})]
            events += [_checkpoint(epoch * STEPS, epoch, 0)]
            if chance.random() < 1 / 20:  # preempted or at its time limit, and back
                restart, cause = restart + 1, chance.choice(["preemption", "preemption", "timeout"])
                events += [_event("signal", signal="SIGTERM", step=epoch * STEPS + 9, epoch=epoch)]
                events += [_checkpoint(epoch * STEPS + 9, epoch, 9), _event("requeued", reason=cause)]
                events += [_start("resumed", epoch * STEPS + 9)]
        for index, rows in enumerate((events, metrics)):
            sizes[index] += sum(len(_line(r)) for r in rows)
        result.events += b"".join(map(_line, events))
        result.metrics += b"".join(map(_line, metrics))
        result.cuts.append((sizes[0], sizes[1]))
        events, metrics = [], []
    return result


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _event(event: str, **details: Any) -> dict[str, Any]:
    head = {"time": DAY, "event": event, "host": "node1", "job_id": "17", "restart": 1, "world_size": 4}
    return head | details


def _checkpoint(step: int, epoch: int, step_in_epoch: int) -> dict[str, Any]:
    where = {"step": step, "epoch": epoch, "step_in_epoch": step_in_epoch}
    return _event("checkpoint", file=f"step_{step:08d}.pt", **where, bytes=59_000_000)


def _start(event: str, step: int) -> dict[str, Any]:
    environment = {"device": "NVIDIA A100-SXM4-40GB", "torch": "2.12.1+cu130", "cuda": "13.0", "data": "0" * 64}
    return _event(event, step=step, file=f"step_{step:08d}.pt", metrics_cut=0, environment=environment, shards=4)


def _row(chance: random.Random, epoch: int, restart: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": epoch * STEPS,
        "images": epoch * 50_000,
        "train_loss": chance.uniform(0.5, 2),
        "train_accuracy": chance.uniform(50, 100),
        "test_loss": chance.uniform(0.5, 2),
        "test_accuracy": chance.uniform(50, 96),
        "lr": chance.uniform(0, 0.05),
        "epoch_seconds": round(chance.uniform(10, 12), 3),
        "images_per_second": round(chance.uniform(9000, 9999), 2),
        "world_size": 4,
        "shards": 4,
        "restart": restart,
        "job_id": "17",
        "time": DAY,
    }


def _squeue(root: Path, lines: list[str]) -> Path:
    folder = root / "bin"
    folder.mkdir()
    (folder / "answer").write_text("".join(line + "\n" for line in lines))
    (folder / "squeue").write_text(f"#!/bin/sh\necho asked >> '{folder}/asked'\nexec cat '{folder}/answer'\n")
    (folder / "squeue").chmod(0o755)
    return folder
