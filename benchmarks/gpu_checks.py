"""Checks that need CUDA: the same bits twice and through DDP, no waiting in the training loop, the project's tests."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu import Report
from benchmarks.gpu_bench import GRAPHS, SAME, Bench, Steps, figure, same
from benchmarks.measure import ROOT, Row
from cifar_hpc.training.distributed.group import OUR_OWN_WATCH, disconnect
from cifar_hpc.training.distributed.shards import ShardReducer
from cifar_hpc.training.engine import BUCKET_MB, Engine

STEPS = 12  # two syncs of Lookahead


def same_bits(bench: Bench, report: Report, amp: str = "bf16") -> None:
    """Two engines of one spec in one process."""
    engines = [bench.engine(bench.batches[0], amp=amp) for _ in range(2)]
    for engine in engines:
        Steps(bench, engine).take(STEPS)
    report.add(same(f"{amp}, deterministic, {STEPS} steps done twice", *engines))


def hook_alone(bench: Bench, report: Report) -> None:
    """Gradients of 4 shards added by the hook of DDP in a group of one process, against plain accumulation."""
    backend, device = ("nccl", bench.device) if bench.cuda else ("gloo", None)
    import torch._dynamo  # noqa: F401  (before there is a group, as in `connect`)

    for name in OUR_OWN_WATCH:
        os.environ.setdefault(name, "0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        report.add(_hook_and_plain(bench, f"{backend}, 4 shards, {STEPS} steps, DDP's hook and plain accumulation"))
    finally:
        disconnect()  # with the engine gone, which holds the group


def _hook_and_plain(bench: Bench, what: str) -> Row:
    hooked, plain = (bench.engine(bench.batches[0], shards=4, graph="off") for _ in range(2))
    devices = [0] if bench.cuda else None
    hooked.ddp = DistributedDataParallel(
        hooked.model, device_ids=devices, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
    )
    hooked.ddp.broadcast_buffers = False
    hooked.reducer = ShardReducer(hooked.ddp, hooked.layout)
    for engine in (hooked, plain):
        Steps(bench, engine).take(STEPS)
    return same(what, hooked, plain)


def no_syncs(bench: Bench, report: Report) -> None:
    """Count what waits for the device in the training loop's steps."""
    for graph in GRAPHS:
        count, place = waits(bench, bench.engine(bench.batches[0], graph=graph))
        report.add(figure(f"bf16, graph={graph}: waits for the device in {STEPS} steps", "", [count], SAME, place))


def waits(bench: Bench, engine: Engine) -> tuple[int, str]:
    """How often STEPS steps wait for the device, and where first; only CUDA can tell."""
    if not bench.cuda:
        return 0, "only CUDA can tell"
    step = Steps(bench, engine)
    step.take(2 * STEPS)  # of the next ones, one prepares the inputs of many
    with _sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.take(STEPS)
    count = sum("called a synchronizing" in str(warning.message) for warning in caught)
    try:
        with _sync_debug_mode("error"):
            step.take(32 if count else 0)
    except RuntimeError as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/cifar_hpc/" in f.filename]
        return count, f"first at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else str(error)
    return count, ""


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def files_with_gpu_tests() -> list[str]:
    """The files of tests that have one with the marker `gpu`; others may need packages that are not here."""
    files = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    return sorted(str(path.relative_to(ROOT)) for path, text in files.items() if re.search(r"mark\.gpu|DEVICES", text))


def tests(bench: Bench, report: Report) -> None:
    """The project's own tests that need a GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        return report.add(text="pytest is not installed here: the tests that need a GPU were not run.")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    ended = subprocess.run(
        [*command, *files_with_gpu_tests()], cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    print("\n".join(lines[-60:]))
    failed = int(ended.returncode != 0)
    report.add(figure("tests that need a GPU: runs that failed", "", [failed], SAME, lines[-1].strip("= ")))
    return None
