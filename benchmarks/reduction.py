"""What the fixed order of summation costs: ShardReducer against DDP's own all-reduce.

    python benchmarks/reduction.py [--ranks 2 4] [--repetitions 40] [--note "who else used the machine"]

Both run in the same processes over the same process group, alternating, so that whatever else the machine does meets
both. Measured are the gradient buckets of the full model (communication alone), and whole training steps of a small
model. NCCL where CUDA is usable (one GPU a rank), else gloo. Prints a table and writes
benchmarks/results/reduction-<date>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cifar_hpc.config.io import from_plain  # noqa: E402
from cifar_hpc.config.spec import Spec  # noqa: E402
from cifar_hpc.data.datasets import Dataset  # noqa: E402
from cifar_hpc.data.synthetic import make_synthetic  # noqa: E402
from cifar_hpc.training.distributed.shards import ShardLayout, ShardSum  # noqa: E402
from cifar_hpc.training.engine import Engine  # noqa: E402
from cifar_hpc.training.environment import configure_torch  # noqa: E402

WARM_UP = 5
SMALL_WIDTH = 0.25  # of the full model: 0.3 million parameters


def spec_of(world: int, device: torch.device, width: float) -> Spec:
    """A spec with a shard for each rank and 16 images for each shard."""
    return from_plain(
        {
            "model": {"width_multiplier": width, "dropout": 0},
            "train": {
                "shards": world, "batch_size": 16 * world, "cpu_threads": 1, "device": device.type, "amp": "fp32",
            },
            "data": {"source": "synthetic"},
            "resources": {"gpus_per_node": int(device.type == "cuda")},
        }
    )  # fmt: skip


def engine_of(rank: int, world: int, device: torch.device, width: float) -> Engine:
    """An engine with its DDP and its fixed-order hook."""
    spec = spec_of(world, device, width)
    configure_torch(spec, device)
    data = Dataset(*make_synthetic(64 * world, 16)).to(device)
    return Engine(spec, device, ShardLayout(world, world, rank), data, "fp32")


def stock(engine: Engine) -> Engine:
    """Replace the hook by DDP's own all-reduce."""
    ids = [engine.device.index] if engine.device.type == "cuda" else None
    engine.reducer = None
    engine.ddp = None
    gc.collect()  # DDP stands in reference cycles, and would go on listening to the parameters
    engine.ddp = DistributedDataParallel(engine.model, device_ids=ids, broadcast_buffers=False)
    return engine


def bucket_sizes(engine: Engine) -> list[int]:
    """Elements in each of DDP's buckets, once it has cut them for good (after the first step)."""
    sizes: list[list[int]] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes[-1].append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    assert engine.ddp is not None
    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
    engine.ddp.register_comm_hook(None, hook)
    for step in range(2):
        sizes.append([])
        engine.step(0, 0, step, torch.arange(engine.spec.train.batch_size, device=engine.device))
    return sizes[-1]


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device, repetitions: int
) -> tuple[list[float], list[float]]:
    """Seconds of each repetition of both: from a barrier until the slowest rank is through."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(WARM_UP + repetitions):
        order = ((0, ours), (1, theirs)) if repetition % 2 else ((1, theirs), (0, ours))
        for which, work in order:
            dist.barrier()
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if repetition >= WARM_UP:
                seconds[which].append(float(taken))
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def communication(rank: int, world: int, device: torch.device, repetitions: int) -> dict[str, Any]:
    """The full model's buckets, one after the other, with no computation."""
    engine = stock(engine_of(rank, world, device, 1.0))
    sizes = bucket_sizes(engine)
    buckets = [torch.randn(size, device=device) for size in sizes]
    layout = engine.layout
    del engine

    received = [bucket.new_empty(ShardSum.room(len(bucket), layout)) for bucket in buckets]

    def in_shard_order(buckets: list[torch.Tensor]) -> list[torch.Tensor]:
        """In place, as ShardReducer does it: each bucket's rows travel while the one before is added."""
        sums: list[ShardSum] = []
        for bucket, room in zip(buckets, received, strict=True):
            sums.append(ShardSum([bucket], layout, room))
            if len(sums) > 1:
                sums[-2].add()
        sums[-1].add()
        return [one.result() for one in sums]

    expected = [bucket.clone() for bucket in buckets]  # both add the same
    for total, found in zip(expected, in_shard_order([bucket.clone() for bucket in buckets]), strict=True):
        dist.all_reduce(total)
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)

    def ours() -> None:
        in_shard_order(buckets)

    def theirs() -> None:
        for bucket in buckets:
            dist.all_reduce(bucket.div_(world))

    seconds = alternate(ours, theirs, device, repetitions)
    return {"parameters": sum(sizes), "buckets": sizes, **summary(*seconds)}


def training(rank: int, world: int, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Whole steps of a small model."""
    fixed = engine_of(rank, world, device, SMALL_WIDTH)
    plain = stock(engine_of(rank, world, device, SMALL_WIDTH))
    rows = torch.arange(fixed.spec.train.batch_size, device=device)

    def step(engine: Engine) -> Callable[[], None]:
        return lambda: engine.step(0, 0, 0, rows)

    seconds = alternate(step(fixed), step(plain), device, repetitions)
    parameters = sum(p.numel() for p in fixed.model.parameters())
    return {"parameters": parameters, "images_a_shard": 16, **summary(*seconds)}


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Quartiles [first, median, third]: milliseconds of both, and the ratios of neighbouring repetitions."""

    def quartiles(values: list[float]) -> list[float]:
        return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")]

    return {
        "repetitions": len(ours),
        "fixed_order_ms": quartiles([1e3 * s for s in ours]),
        "all_reduce_ms": quartiles([1e3 * s for s in theirs]),
        "ratio": quartiles([a / b for a, b in zip(ours, theirs, strict=True)]),
        "extra_seconds": [round(a - b, 6) for a, b in zip(ours, theirs, strict=True)],
    }


def work(rank: int, world: int, repetitions: int, folder: str) -> None:
    """One rank; rank 0 leaves its results in `folder`."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        device_id=device if cuda else None,
    )
    results = {
        "ranks": world,
        "communication": communication(rank, world, device, repetitions),
        "training_step": training(rank, world, device, repetitions),
    }
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, repetitions: int) -> dict[str, Any]:
    """Start `world` processes and measure."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (world, repetitions, folder), nprocs=world, start_method="spawn")
        results: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
        return results


def environment(note: str) -> dict[str, Any]:
    """Where this was measured."""
    cuda = torch.cuda.is_available()
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": "nccl" if cuda else "gloo over loopback",
        "device": torch.cuda.get_device_name() if cuda else model,
        "devices": torch.cuda.device_count() if cuda else f"{len(os.sched_getaffinity(0))} cores, shared by all ranks",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "note": note,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Medians, with the quartiles of the ratio."""
    lines = [f"{'ranks':>5}  {'what':<14} {'fixed order':>12} {'all-reduce':>12} {'ratio':>7}  quartiles"]
    for result in results:
        for what in ("communication", "training_step"):
            one = result[what]
            low, middle, high = one["ratio"]
            lines.append(
                f"{result['ranks']:>5}  {what:<14} {one['fixed_order_ms'][1]:9.2f} ms "
                f"{one['all_reduce_ms'][1]:9.2f} ms {middle:7.2f}  {low:.2f} to {high:.2f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=40, help="of each, after the warm-up")
    parser.add_argument("--note", default="", help="kept in the results, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    if torch.cuda.is_available() and max(options.ranks) > torch.cuda.device_count():
        parser.error(f"--ranks {max(options.ranks)}: NCCL needs a GPU for each; here are {torch.cuda.device_count()}")
    where = environment(options.note)
    results = [measure(world, options.repetitions) for world in options.ranks]
    print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"reduction-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
