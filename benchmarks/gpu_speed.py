"""Whole training steps on a GPU: the product's modes against each other, against its peers, compiled, as a graph."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_bench import Bench, Report, Steps, Timed, compared, differing, figure, state_tensors, timed_engine
from benchmarks.measure import alternate
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.optim import Lookahead

RATE_TARGET = ">= 45000 img/s"
NAIVE_TARGET = ">= 5"
EXACT_TARGET = ">= 0.9"  # the bit-exact mode costs at most 10 %
EXACT = "deterministic"
PEER_IMAGES = 50_000


def use_fused_sgd(engine: Engine) -> None:
    """One kernel for all of SGD, as torch.optim.SGD(fused=True) has it."""
    inner = engine.optimizer.inner if isinstance(engine.optimizer, Lookahead) else engine.optimizer
    for group in inner.param_groups:
        group["fused"], group["foreach"] = True, False


def modes(bench: Bench, report: Report) -> None:
    """The default mode, without deterministic kernels, with fused SGD and in fp16, at each batch size."""
    for batch in bench.batches:
        fast = {"deterministic": False}
        engines = {
            EXACT: bench.engine(batch),
            "deterministic=false": bench.engine(batch, train=fast),
            "deterministic, fused SGD": bench.engine(batch),
            "deterministic, fp16": bench.engine(batch, train={"amp": "fp16"}),
            "deterministic=false, fp16": bench.engine(batch, train={"amp": "fp16"} | fast),
        }
        use_fused_sgd(engines["deterministic, fused SGD"])
        works = {name: timed_engine(bench, name, engine).calibrate(bench) for name, engine in engines.items()}
        seconds = alternate(works, bench.repetitions, wait=bench.wait)
        rates = {name: work.rates(seconds[name]) for name, work in works.items()}
        what = f"training step, batch {batch}, {EXACT} {engines[EXACT].amp}"
        report.add(figure(what, "img/s", rates[EXACT], RATE_TARGET, _memory(bench)))
        for name in list(rates)[1:]:
            target = EXACT_TARGET if engines[name].amp == engines[EXACT].amp else ""
            report.add(compared(what, rates[EXACT], f"ours, {name}", rates[name], target))


def _memory(bench: Bench) -> str:
    if not bench.cuda:
        return ""
    return f"at most {torch.cuda.max_memory_allocated(bench.device) / 2**30:.1f} GiB for all engines together"


class EnoughError(Exception):
    """Ends a peer's training."""


def peers(bench: Bench, report: Report) -> None:
    """Against what users would write, with their two DataLoader workers and with all cores."""
    few, many = 2, max(2, (os.cpu_count() or 2) - 2)
    races = [(batch, name, workers) for batch in bench.batches[:3:2] for name in ("naive", "careful")
             for workers in (few, many)]  # fmt: skip
    races.append((bench.batches[0], "lightning_peer", few))
    for batch, name, workers in races[:1] if bench.quick else races:
        if name == "lightning_peer" and importlib.util.find_spec("lightning") is None:
            report.add(text="Lightning is not installed here.")
            continue
        ours, theirs = race(bench, name, batch, workers)
        what = f"training step, batch {batch}, {EXACT}"
        label = f"{name.removesuffix('_peer')}, {workers} workers"
        report.add(compared(what, ours, label, theirs, NAIVE_TARGET if name == "naive" else ""))


def race(bench: Bench, name: str, batch: int, workers: int) -> tuple[list[float], list[float]]:
    """Images a second of ours and of a peer, in turns: after each of its turns the peer's loop waits while ours runs.

    Meanwhile the peer's workers fill their queue. The peer uses that up before its next turn is timed.
    """
    train: Callable[..., None] = importlib.import_module(f"benchmarks.peers.{name}").train
    images = importlib.import_module("benchmarks.peers.data").Images
    count = 512 if bench.quick else PEER_IMAGES
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    data = images(pixels, random.integers(0, 10, count).tolist())
    threads = torch.get_num_threads()
    own = timed_engine(bench, "ours", bench.engine(batch)).calibrate(bench)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    turns = Turns(bench, own, batch, drain=2 + 2 * workers)
    with tempfile.TemporaryDirectory() as folder, suppress(EnoughError):
        train(data, Path(folder), turns, batch_size=batch, workers=workers, **({"width": 8} if bench.quick else {}))
    return turns.ours, turns.theirs


class Turns:
    """Called by a peer after each of its steps; times its turns, and takes ours between them."""

    def __init__(self, bench: Bench, own: Timed, batch: int, drain: int) -> None:
        self._bench, self._own, self._batch, self._drain = bench, own, batch, drain
        self._seconds = bench.seconds * 4
        self._steps, self._began = -drain, 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def __call__(self) -> None:
        self._steps += 1
        if self._steps == 0:
            self._bench.wait()
            self._began = time.perf_counter()
        elif self._steps > 0 and time.perf_counter() - self._began > self._seconds:
            self._bench.wait()
            self.theirs.append(self._batch * self._steps / (time.perf_counter() - self._began))
            self.ours += self._take_ours()
            self._steps = -self._drain
            if len(self.ours) >= min(4, self._bench.repetitions):
                raise EnoughError

    def _take_ours(self) -> list[float]:
        with kept_switches():
            began = time.perf_counter()
            self._own()
            self._bench.wait()
            return self._own.rates([time.perf_counter() - began])


@contextmanager
def kept_switches() -> Iterator[None]:
    """PyTorch's switches are afterwards what they were before."""
    exact, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(exact)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)


def compiled(mode: str) -> Callable[[Bench, Report], None]:
    """The piece that measures torch.compile of the model in that mode."""

    def piece(bench: Bench, report: Report) -> None:
        for batch in bench.batches[::3] or bench.batches[:1]:
            engine = bench.engine(batch, train={"deterministic": False})
            # Inductor compiles C++ on a CPU, which a rehearsal need not wait for.
            engine.model.compile(**({"backend": "aot_eager"} if bench.quick else {"mode": mode, "dynamic": False}))
            began = time.perf_counter()
            works = {
                name: timed_engine(bench, name, e).calibrate(bench)
                for name, e in (("compiled", engine), (EXACT, bench.engine(batch)))
            }
            note = f"compiled and warmed up in {time.perf_counter() - began:.0f} s"
            seconds = alternate(works, bench.repetitions, wait=bench.wait)
            exact, fast = (works[name].rates(seconds[name]) for name in (EXACT, "compiled"))
            what = f"training step, batch {batch}, {EXACT} {engine.amp}"
            report.add(compared(what, exact, f"ours, deterministic=false, compile {mode}", fast, EXACT_TARGET, note))

    return piece


def graph(bench: Bench, report: Report) -> None:
    """An experiment: whole steps replayed as one CUDA graph, bits compared with the same steps taken one by one."""
    if not bench.cuda:
        return report.add(text="CUDA graphs: only CUDA has them.")
    for batch in bench.batches:
        eager, replayed = (GraphedSteps(bench.engine(batch, lookahead={"enabled": False})) for _ in range(2))
        replayed.capture()
        for _ in range(GraphedSteps.WARM_UP):
            eager()
        for _ in range(10):
            eager()
            replayed()
        different = differing(state_tensors(eager.engine), state_tensors(replayed.engine))
        works = {
            name: Timed(name, batch, step).calibrate(bench) for name, step in (("steps", eager), ("graph", replayed))
        }
        seconds = alternate(works, bench.repetitions, wait=bench.wait)
        one, other = (works[name].rates(seconds[name]) for name in works)
        note = f"an experiment, without Lookahead; {different} tensors differ in any bit after 10 steps"
        what = f"training step, batch {batch}, {EXACT} {eager.engine.amp}"
        report.add(compared(what, one, "the same step as a CUDA graph", other, note=note))
    return None


class GraphedSteps(Steps):
    """Steps that may be captured as a CUDA graph: the rows and the key of augmentation and dropout are tensors.

    The learning rate is frozen, and Lookahead has to be off.
    """

    WARM_UP = 5

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rows = self._order[: self.batch].clone()
        self._key = torch.zeros((), dtype=torch.int64, device=engine.device)
        self._augmented, self._set_key = engine.augmented, engine.exact.set_key
        # Within a step both keys come from here, since a graph would freeze Python's numbers.
        engine.augmented = lambda indices, key: self._augmented(indices, self._key)  # type: ignore[method-assign]
        engine.exact.set_key = lambda key, device: self._set_key(self._key, device)  # type: ignore[method-assign]

    def capture(self) -> None:
        """Take WARM_UP steps, then capture one."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.engine.step(0, 0, 0, self._rows)
        self._graph = graph

    def __call__(self) -> None:
        first = self.done % self.in_epoch * self.batch
        self.done += 1
        self._rows.copy_(self._order[first : first + self.batch])
        self._key.fill_(self.done)
        if self._graph is None:
            self.engine.step(0, 0, 0, self._rows)
        else:
            self._graph.replay()
