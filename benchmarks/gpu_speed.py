"""Whole training steps on a GPU: the card's limits, eager steps, CUDA graphs, other modes, and peers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import Report
from benchmarks.gpu_bench import (
    GRAPHS,
    RATE_TARGETS,
    Bench,
    Steps,
    compared,
    figure,
    read_switches,
    same,
    set_switches,
    target_of,
)
from benchmarks.gpu_checks import STEPS, same_bits, waits
from benchmarks.measure import alternate
from cifar_hpc.errors import RunFailedError
from cifar_hpc.training.inputs import AHEAD
from cifar_hpc.training.process import process_age

NAIVE_TARGET, CAREFUL_TARGET = ">= 4", ">= 1.3"
PEER_IMAGES = 50_000
TIMES, SMALL_OPERATIONS = 10, 400  # fewer than may wait in CUDA's queue


def warm_up(bench: Bench, report: Report) -> None:
    """The first steps, which load libraries and kernels, and raise the clocks."""
    Steps(bench, bench.engine(bench.batches[0])).take(STEPS)
    bench.wait()
    report.add(figure(f"this process: from its beginning to {STEPS} steps done", "s", [process_age()]))


def ceilings(bench: Bench, report: Report) -> None:
    """What the card does at best, and what the host needs to launch an operation."""
    size = 256 if bench.quick else 8192
    one, other = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    source = torch.zeros(2**20 if bench.quick else 2**31, dtype=torch.uint8, device=bench.device)
    product, target, small = torch.empty_like(one), torch.empty_like(source), torch.zeros(16, device=bench.device)
    works = {
        "copy": lambda: [target.copy_(source) for _ in range(TIMES)],
        "product": lambda: [torch.mm(one, other, out=product) for _ in range(TIMES)],
    }
    seconds = alternate(works, 2 * bench.repetitions, warm_up=3, wait=bench.wait)
    host = []
    for _ in range(2 * bench.repetitions):
        bench.wait()
        began = time.perf_counter()
        for _ in range(SMALL_OPERATIONS):
            small.add_(1)
        host.append(1e6 * (time.perf_counter() - began) / SMALL_OPERATIONS)
    report.add(
        figure("a copy, bytes read and written", "TB/s", [2e-12 * TIMES * len(source) / s for s in seconds["copy"]]),
        figure(f"bf16 product of {size}", "TFLOP/s", [2e-12 * TIMES * size**3 / s for s in seconds["product"]]),
        figure("host: launching an operation", "us", host),
    )


def rates(bench: Bench, report: Report) -> None:
    """Eager steps of each batch size: their wall time, and for how long of it the host is busy."""
    for batch in bench.batches:
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        engine = bench.engine(batch, graph="off")
        found = bench.rates({"eager": engine})["eager"]
        step, host = Steps(bench, engine), []
        for _ in range(max(1, AHEAD[bench.device.type] // (batch * 32**2))):  # as many as are augmented at once
            bench.wait()  # else CUDA's queue is full, and launching takes as long as the device
            began = time.perf_counter()
            step.take()
            host.append(1e3 * (time.perf_counter() - began))
        note = f"{1e3 * batch / statistics.median(found):.3g} ms a step, enqueued in {statistics.mean(host):.3g} ms"
        if bench.cuda:
            note += f"; at most {torch.cuda.max_memory_allocated(bench.device) / 2**30:.1f} GiB"
        report.add(figure(f"eager step, batch {batch}, deterministic {engine.amp}", "img/s", found, note=note))
        del engine, step


def graph(bench: Bench, report: Report) -> None:
    """Whole steps as CUDA graphs: the bits of eager steps, over three epochs with an odd last batch; then the rates."""
    if not bench.cuda:
        report.add(text="CUDA graphs: only CUDA has them, so two eager engines stand in here.")
    for batch in (bench.batches[0], bench.batches[2]):
        what = f"step, batch {batch}, deterministic bf16, CUDA graph"
        engines = {switch: bench.engine(batch, images=8 * batch + batch // 2, graph=switch) for switch in GRAPHS}
        for engine in engines.values():
            Steps(bench, engine).take(27)  # 21 of them are replayed, with 5 syncs of Lookahead, and 3 are odd
        report.add(same(f"{what} and eager, 27 steps", *engines.values()))
        engines = {switch: bench.engine(batch, graph=switch) for switch in GRAPHS}
        found = bench.rates(engines)
        target = target_of(RATE_TARGETS, bench.gpu) if batch == bench.batches[0] else ""
        report.add(figure(what, "img/s", found["on"], target), compared(what, found["on"], "eager", found["off"]))


def fp16(bench: Bench, report: Report) -> None:
    """The same bits and the speed of fp16. GradScaler has to wait once a step, to look for overflows."""
    same_bits(bench, report, "fp16")
    _against(bench, report, "fp16", amp="fp16")
    count, place = waits(bench, bench.engine(bench.batches[0], amp="fp16"))
    report.add(figure(f"fp16: waits for the device in {STEPS} steps", "", [count], note=place))


def nondeterministic(bench: Bench, report: Report) -> None:
    """What deterministic kernels cost."""
    _against(bench, report, "deterministic=false", deterministic=False)


def _against(bench: Bench, report: Report, name: str, **train: Any) -> None:
    """Eager steps of the default mode and of another one, in turns."""
    for batch in (bench.batches[0], bench.batches[2]):
        engines = {"ours": bench.engine(batch, graph="off"), name: bench.engine(batch, graph="off", **train)}
        found = bench.rates(engines)
        report.add(compared(f"eager step, batch {batch}, deterministic bf16", found["ours"], name, found[name]))


def fused_sgd(bench: Bench, report: Report) -> None:
    """SGD in one kernel, which CUDA graphs need, against SGD with foreach: bits and speed."""
    engines = {name: bench.engine(bench.batches[0], graph="off") for name in ("fused", "foreach")}
    for name, engine in engines.items():
        for group in engine.optimizer.param_groups:
            fused = name == "fused"
            group |= {"fused": fused, "foreach": not fused, "lr": group["lr"] if fused else float(group["lr"])}
        Steps(bench, engine).take(STEPS)
    what = f"eager step, batch {bench.batches[0]}, SGD fused"
    report.add(same(f"{what} and with foreach, {STEPS} steps", *engines.values(), target=""))
    found = bench.rates(engines)
    report.add(compared(what, found["fused"], "foreach", found["foreach"]))


class EnoughError(Exception):
    """Ends a peer's training."""


def peers(bench: Bench, report: Report) -> None:
    """Against what users would write, with as many DataLoader workers as they would take."""
    first, _, large, _ = bench.batches
    many = min(14, max(2, (os.cpu_count() or 2) - 2))
    races = [(first, "naive", 2, NAIVE_TARGET), (first, "careful", many, CAREFUL_TARGET)]
    races += [(large, "careful", many, CAREFUL_TARGET), (first, "lightning_peer", many, "")]
    graphs = usable_graphs(bench, report)
    for batch, name, workers, target in races:
        if name == "lightning_peer" and not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
            report.add(text="Lightning is not installed here.")
            continue
        turns = race(bench, name, batch, workers, graphs)
        label = f"{name.removesuffix('_peer')}, {workers} workers"
        for graph, ours in turns.ours.items():
            report.add(compared(f"step, batch {batch}, graph={graph}", ours, label, turns.theirs, target))


def usable_graphs(bench: Bench, report: Report) -> tuple[str, ...]:
    """The values of train.graph that work: if one does not, the others are still to be raced."""
    for graph in GRAPHS:
        try:
            Steps(bench, bench.engine(bench.batches[0], graph=graph)).take(STEPS)
        except RunFailedError as error:
            report.add(text=str(error))
            return ("off",)
    return GRAPHS


def race(bench: Bench, name: str, batch: int, workers: int, graphs: tuple[str, ...]) -> Turns:
    """Images a second of ours and of a peer, in turns: after each of its turns the peer's loop waits while ours runs.

    Meanwhile the peer's workers fill their queue. The peer uses that up before its next turn is timed.
    """
    train: Callable[..., None] = importlib.import_module(f"benchmarks.peers.{name}").train
    images = importlib.import_module("benchmarks.peers.data").Images
    count = 512 if bench.quick else PEER_IMAGES
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    data = images(pixels, random.integers(0, 10, count).tolist())
    own = {graph: Steps(bench, bench.engine(batch, graph=graph)).calibrate() for graph in graphs}
    set_switches(*bench.switches)  # a peer has PyTorch's own, such as TF32 in convolutions
    turns = Turns(bench, own, batch, drain=2 + 2 * workers)
    with tempfile.TemporaryDirectory() as folder, suppress(EnoughError):
        train(data, Path(folder), turns, batch_size=batch, workers=workers, **({"width": 8} if bench.quick else {}))
    return turns


class Turns:
    """Called by a peer after each of its steps; times its turns, and takes ours between them."""

    def __init__(self, bench: Bench, own: dict[str, Steps], batch: int, drain: int) -> None:
        self._bench, self._own, self._batch, self._drain = bench, own, batch, drain
        self._seconds = bench.seconds * 4
        self._steps, self._began = -drain, 0.0
        self.ours: dict[str, list[float]] = {name: [] for name in own}
        self.theirs: list[float] = []

    def __call__(self) -> None:
        self._steps += 1
        if self._steps == 0:
            self._bench.wait()
            self._began = time.perf_counter()
        elif self._steps > 0 and time.perf_counter() - self._began > self._seconds:
            self._bench.wait()
            self.theirs.append(self._batch * self._steps / (time.perf_counter() - self._began))
            self._take_ours()
            self._steps = -self._drain
            if len(self.theirs) >= min(4, self._bench.repetitions):
                raise EnoughError

    def _take_ours(self) -> None:
        switches = read_switches()
        for name, own in self._own.items():
            began = time.perf_counter()
            own()
            self._bench.wait()
            self.ours[name] += own.rates([time.perf_counter() - began])
        set_switches(*switches)
