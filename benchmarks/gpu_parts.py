"""Where a training step's time goes on a GPU: augmentation, the snapshot for a checkpoint, kernels and gaps."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_bench import Bench, Report, Steps, Timed, figure, timed_engine
from benchmarks.measure import alternate
from cifar_hpc.training.checkpoints.format import to_host
from cifar_hpc.training.engine import Engine

AUGMENTATION_TARGET = "< 5 %"
STALL_TARGET = "< 5 ms"
PROFILED_STEPS = 10
AHEAD = 8


def augmentation(bench: Bench, report: Report) -> None:
    """What augmentation adds to a step: steps with it and steps that are given images, in turns."""
    for batch in bench.batches:
        whole, given = bench.engine(batch), bench.engine(batch)
        rows = torch.arange(batch, device=bench.device)
        ready = given.augmented(rows, 0)
        given.augmented = lambda indices, key, ready=ready: ready  # type: ignore[misc, method-assign]
        works = {n: timed_engine(bench, n, e).calibrate(bench) for n, e in (("whole", whole), ("given", given))}
        works["given"].steps = works["whole"].steps
        seconds = alternate(works, bench.repetitions, wait=bench.wait)
        shares = [100 * (1 - b / a) for a, b in zip(seconds["whole"], seconds["given"], strict=True)]
        report.add(figure(f"augmentation in a step, batch {batch}", "%", shares, AUGMENTATION_TARGET))
        for count, what in ((batch, "one batch"), (AHEAD * batch, f"{AHEAD} batches at once")):
            work = _augmenting(whole, torch.arange(count, device=bench.device) % len(whole.data.train_images))
            timed = Timed(what, batch, work).calibrate(bench)
            spent = alternate({what: timed}, bench.repetitions, wait=bench.wait)[what]
            each = [1e6 * s / timed.steps / count for s in spent]
            report.add(figure(f"augmentation alone, {what} of {batch}", "us an image", each))


def _augmenting(engine: Engine, rows: torch.Tensor) -> Callable[[], object]:
    return lambda: engine.augmented(rows, 0)


def stall(bench: Bench, report: Report) -> None:
    """How long a checkpoint keeps the training loop: the steps around a snapshot against the same steps without."""
    batch, around = bench.batches[0], 20
    step = Steps(bench.engine(batch))

    def steps() -> None:
        for _ in range(around):
            step()

    def steps_and_snapshot() -> None:
        steps()
        snapshot(step.engine)

    works = {"steps": steps, "steps and snapshot": steps_and_snapshot}
    seconds = alternate(works, max(3, 2 * bench.repetitions), warm_up=2, wait=bench.wait)
    added = [1e3 * (b - a) for a, b in zip(*seconds.values(), strict=True)]
    report.add(figure("checkpoint: what a snapshot adds to the training loop", "ms", added, STALL_TARGET))
    tensors = [t for t in torch.utils._pytree.tree_leaves(step.engine.state()) if isinstance(t, torch.Tensor)]
    bench.wait()
    alone = {"to the host": lambda: snapshot(step.engine), "on the device": lambda: [t.clone() for t in tensors]}
    seconds = alternate(alone, max(3, 2 * bench.repetitions), warm_up=2, wait=bench.wait)
    size = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    for name, values in seconds.items():
        note = f"{len(tensors)} tensors, {size:.0f} MiB"
        report.add(figure(f"a copy of the training state {name}", "ms", [1e3 * s for s in values], note=note))


def snapshot(engine: Engine) -> object:
    """What Trainer does before a checkpoint goes to its writer."""
    engine.check_finite()
    return to_host({**engine.state(), "sums": engine.epoch_sums()})


def profiles(bench: Bench, report: Report) -> None:
    """Kernels of a step, how long they keep the GPU busy, and the longest of them."""
    for batch in (bench.batches[0], bench.batches[-1]):
        for mode in ({}, {"deterministic": False}):
            name = f"batch {batch}, {'deterministic=false' if mode else 'deterministic'}"
            engine = bench.engine(batch, train=mode)
            timed = timed_engine(bench, name, engine).calibrate(bench)
            spent = alternate({name: timed}, bench.repetitions, wait=bench.wait)[name]
            step_ms = [1e3 * s / timed.steps for s in spent]
            trace = traced(bench, timed.step)
            busy = trace.busy_ms / PROFILED_STEPS
            report.add(
                figure(f"{name}: a step", "ms", step_ms),
                figure(f"{name}: kernels, copies and fills in a step", "", [trace.count / PROFILED_STEPS]),
                figure(f"{name}: calls from the host that launch one", "", [trace.launches / PROFILED_STEPS]),
                figure(f"{name}: GPU busy, while not profiled", "%", [100 * busy / ms for ms in step_ms]),
                figure(f"{name}: median gap between two kernels, profiled", "us", [trace.median_gap_us]),
                text=f"{name}: a step keeps the GPU busy for {busy:.2f} ms\n\n{trace.table()}",
            )


@dataclass(frozen=True)
class Trace:
    """What a profile says about the device."""

    busy_ms: float
    count: int
    launches: int
    median_gap_us: float
    kernels: Sequence[tuple[str, int, float]]  # name, calls, microseconds in all; the longest first

    def table(self, rows: int = 15) -> str:
        """The longest kernels, as a table of Markdown."""
        total = sum(us for _, _, us in self.kernels) or 1.0
        lines = ["| kernel | calls a step | us a step | share |", "|---|---|---|---|"]
        for name, calls, us in self.kernels[:rows]:
            each = f"{calls / PROFILED_STEPS:g} | {us / PROFILED_STEPS:.1f} | {100 * us / total:.1f} %"
            lines.append(f"| `{name[:90].replace('|', '/')}` | {each} |")
        return "\n".join(lines)


def traced(bench: Bench, step: Callable[[], object]) -> Trace:
    """Profile PROFILED_STEPS steps; without CUDA the operators stand in for the kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    bench.wait()
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        bench.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return read_trace(events, ("kernel", "gpu_memcpy", "gpu_memset") if bench.cuda else ("cpu_op",))


def read_trace(events: Sequence[dict[str, Any]], categories: Sequence[str]) -> Trace:
    """Sum up a Chrome trace; the categories are those of the device's work."""
    work = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("ph") == "X" and e.get("cat") in categories)
    busy, gaps, end = 0.0, [0.0], None
    for start, duration, _ in work:
        if end is not None:
            gaps.append(max(0.0, start - end))
        busy += max(0.0, start + duration - max(start, end or start))
        end = max(end or start, start + duration)
    calls, times = Counter(name for _, _, name in work), Counter[str]()
    for _, duration, name in work:
        times[name] += duration
    launches = sum(
        e.get("cat") in ("cuda_runtime", "cuda_driver") and any(w in e["name"] for w in ("Launch", "Memcpy", "Memset"))
        for e in events
    )
    kernels = [(name, calls[name], us) for name, us in times.most_common()]
    return Trace(busy / 1e3, len(work), launches, sorted(gaps)[len(gaps) // 2], kernels)
