"""How training scales with processes, batch and width, and whether memory stays flat over a long run.

Processes: `python -m cifar_hpc train` of one run (the same shards, so the same bits) on 1, 2 and 4 processes of one
thread each, over gloo. Batch and width: steps of the engine with 2 threads. Memory: a tiny run of 200 epochs; it is
flat where the resident memory of the last ten epochs is at most 1 % above that of the ten from epoch 50 on (medians).
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import ROOT, Row, alternate, meets, quartiles, ratios, run_part
from cifar_hpc.config.io import from_plain
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, resolve_amp

SHARDS, THREADS = 4, 2
FLAT = "<= 1.01"
WINDOW = 10  # epochs of which the median is taken
RUN, JOB = "run", "job.yaml"
LIMIT_SECONDS = 240

Values = dict[str, Any]


def measure(quick: bool) -> list[Row]:
    """Rows of the part "scaling"."""
    return [*process_rows(quick), *size_rows(quick), *([] if quick else memory_rows())]


@contextmanager
def training(values: Values, world: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A run of the job `values` on `world` processes in a project of its own, and its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, JOB).write_text(yaml.safe_dump(values))
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"] if world > 1 else []
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, "cifar_hpc", "train", str(Path(folder, JOB)), "--name", RUN],
            cwd=ROOT,
            env=os.environ | {"CIFAR_HPC_ROOT": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            yield process, Path(folder, "logs", RUN, "metrics.jsonl")
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its processes, which are not in its group
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def job(width: float, batch: int, train_size: int, epochs: int, shards: int) -> Values:
    """A job on synthetic images and the CPU, with as little evaluation as there can be."""
    return {
        "model": {"width_multiplier": width},
        "train": {"epochs": epochs, "batch_size": batch, "shards": shards, "cpu_threads": 1, "device": "cpu"},
        "lookahead": {"bn_batches": 0},
        "data": {"source": "synthetic", "train_size": train_size, "test_size": 2},
        "checkpoint": {"every_epochs": 1000},
        "resources": {"gpus_per_node": 0},
    }


def process_rows(quick: bool) -> list[Row]:
    """Images per second that the run itself reports, on 1, 2 and 4 processes."""
    batch, epochs, width = (32, 2, 0.5) if quick else (128, 4, 1.0)
    worlds = (1, 2) if quick else (1, 2, 4)
    values = job(width, batch, 2 * batch, epochs, SHARDS)
    speeds = {world: _speeds(values, world) for world in worlds}
    what = f"the trainer, width {width:g}, batch {batch} in {SHARDS} shards, gloo, 1 thread each: "
    cores = len(os.sched_getaffinity(0))
    rows = [Row("scaling", f"{what}1 process", "img/s", quartiles(speeds[1]))]
    for world in worlds[1:]:
        note = f"{world} processes on {cores} cores: oversubscribed" if world > cores else ""
        ratio = ratios(speeds[world], speeds[1])
        ours, theirs = quartiles(speeds[world]), quartiles(speeds[1])
        rows.append(
            Row("scaling", f"{what}{world} processes", "img/s", ours, "1 process", theirs, ratio, note=note)
        )  # fmt: skip
    return rows


def _speeds(values: Values, world: int) -> list[float]:
    with training(values, world) as (process, metrics):
        status = process.wait(LIMIT_SECONDS)
        if status != 0:
            raise RuntimeError(f"a run on {world} processes ended with exit status {status}")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["images_per_second"] for row in rows[1:]]  # the first epoch sets up every kernel


def size_rows(quick: bool) -> list[Row]:
    """Time of a step as the batch and the model grow."""
    batches, repetitions = ((8, 16), 2) if quick else ((32, 64, 128), 4)
    torch.set_num_threads(THREADS)
    data = Dataset(*make_synthetic(max(batches), 2))
    works = {(1.0, batch): _step(1.0, batch, data) for batch in batches}
    works |= {(width, max(batches)): _step(width, max(batches), data) for width in (0.25, 0.5)}
    base = (1.0, max(batches))
    named = alternate({str(key): work for key, work in works.items()}, repetitions)
    rows = []
    for key in works:
        width, batch = key
        ours, full = ([1e3 * s for s in named[str(k)]] for k in (key, base))
        what = f"training step, width {width:g}, batch {batch}, {THREADS} threads"
        beside = () if key == base else (f"width 1, batch {max(batches)}", quartiles(full), ratios(ours, full))
        rows.append(Row("scaling", what, "ms", quartiles(ours), *beside))
    return rows


def _step(width: float, batch: int, data: Dataset) -> Callable[[], None]:
    device = torch.device("cpu")
    spec = from_plain({"model": {"width_multiplier": width}, "train": {"batch_size": batch, "cpu_threads": THREADS}})
    configure_torch(spec, device)
    engine = Engine(spec, device, ShardLayout(1, 1, 0), data, resolve_amp(spec, device))
    return lambda: engine.step(0, 0, 0, torch.arange(batch))


def memory_rows() -> list[Row]:
    """Resident memory over the epochs of a tiny run."""
    epochs, start = 200, 50
    values = job(0.0625, 32, 64, epochs, 1)
    values["model"]["blocks"] = [1, 1, 1]
    values["lookahead"]["bn_batches"] = 2
    values["checkpoint"]["every_epochs"] = 1  # each of them: this is where memory could be kept
    used = resident_by_epoch(values)
    seen = [e for e in range(start, epochs) if e in used]
    late = [used[e] for e in seen]
    slope = 1024 * statistics.linear_regression(seen, late).slope
    first, last = late[:WINDOW], late[-WINDOW:]
    ratio = quartiles([statistics.median(last) / statistics.median(first)])
    note = f"MiB at epoch 20: {used.get(20, late[0]):.1f}; slope from epoch {start} on: {slope:.2f} KiB an epoch"
    what = f"resident memory at the end of {epochs} epochs"
    peer, met = f"at epoch {start}", meets(ratio[1], FLAT)
    return [Row("scaling", what, "MiB", quartiles(last), peer, quartiles(first), ratio, FLAT, met, note)]


def resident_by_epoch(values: Values) -> dict[int, float]:
    """MiB of resident memory, as last seen before the end of each epoch (counted from 0)."""
    used: dict[int, float] = {}
    with training(values, 1) as (process, metrics):
        until = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None:
            if time.monotonic() > until:
                raise RuntimeError(f"the tiny run took longer than {LIMIT_SECONDS} s")
            with suppress(OSError, StopIteration):  # not there yet, or gone
                done = metrics.read_bytes().count(b"\n")
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                used[done] = int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
            time.sleep(0.02)
        if process.returncode != 0:
            raise RuntimeError(f"the tiny run ended with exit status {process.returncode}")
    return used


if __name__ == "__main__":
    run_part(measure, __doc__)
