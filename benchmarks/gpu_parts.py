"""Where a training step's time goes on a GPU: checkpoints beside it, and its kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.gpu import Report
from benchmarks.gpu_bench import Bench, Steps, figure
from benchmarks.measure import alternate
from benchmarks.running import trainer_around
from cifar_hpc.training.checkpoints.format import to_host

STALL_TARGET = "< 5 ms"
PROFILED_STEPS = 32  # of the default size as many as are augmented at once
SHOWN_KERNELS = 15


def stall(bench: Bench, report: Report) -> None:
    """What checkpoints add to the steps around them: the snapshot alone, and one that is written meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        step = Steps(bench, bench.engine(bench.batches[0])).calibrate()
        trainer, engine = trainer_around(step.engine, Path(folder)), step.engine
        store, few, many = trainer.store, 2 if bench.quick else 10, 2 * step.count  # longer than writing takes
        assert store is not None

        def snapshot() -> None:
            step.take(few)
            engine.check_finite()  # as Trainer.save
            to_host({**engine.state(), "sums": engine.epoch_sums()})
            step.take(few)

        def written() -> None:
            trainer.position.step = step.done
            trainer.save()
            step.take(many)

        def settle() -> None:
            bench.wait()
            store.wait()

        alone = {"without": lambda: step.take(2 * few), "with": snapshot}
        beside = {"without": lambda: step.take(many), "with": written}
        for what, count, target, seconds in (
            ("a snapshot adds to the training loop", 2 * few, STALL_TARGET,
             alternate(alone, 2 * bench.repetitions, 2, bench.wait)),
            ("a snapshot, and writing it to this disk meanwhile, add", many, "",
             alternate(beside, bench.repetitions, wait=settle)),
        ):  # fmt: skip
            added = [1e3 * (b - a) for a, b in zip(seconds["without"], seconds["with"], strict=True)]
            report.add(figure(f"checkpoint: {what}", "ms", added, target, f"to {count} steps"))


def profile(bench: Bench, report: Report) -> None:
    """Kernels of an eager step, how long they keep the GPU busy, and the longest of them."""
    count = 4 if bench.quick else PROFILED_STEPS
    for batch in (bench.batches[0], bench.batches[2]):
        name, step = f"batch {batch}, eager", Steps(bench, bench.engine(batch, graph="off")).calibrate()
        spent = alternate({name: step}, bench.repetitions, wait=bench.wait)[name]
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
        ) as profiler:
            step.take(count)
            bench.wait()
        # On a CPU the operators stand in for the kernels.
        kind = DeviceType.CUDA if bench.cuda else DeviceType.CPU
        kernels = {
            e.key: (e.count / count, (e.self_device_time_total if bench.cuda else e.self_cpu_time_total) / count)
            for e in profiler.key_averages()
            if e.device_type == kind and not e.is_user_annotation
        }
        busy = sum(us for _, us in kernels.values()) / 1e3
        report.add(
            figure(f"{name}: kernels, copies and fills in a step", "", [sum(calls for calls, _ in kernels.values())]),
            figure(f"{name}: they keep the GPU busy for", "ms", [busy]),
            figure(f"{name}: of a step, while not profiled", "%", [100 * busy * step.count / (1e3 * s) for s in spent]),
            text=f"{name}:\n\n{kernel_table(kernels)}",
        )


def kernel_table(kernels: Mapping[str, tuple[float, float]]) -> str:
    """The longest kernels, as a table of Markdown, from the calls and microseconds a step of each."""
    total = sum(us for _, us in kernels.values()) or 1.0
    lines = ["| kernel | calls a step | us a step | share |", "|---|---|---|---|"]
    for name, (calls, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:SHOWN_KERNELS]:
        lines.append(f"| `{name[:90].replace('|', '/')}` | {calls:g} | {us:.1f} | {100 * us / total:.1f} % |")
    return "\n".join(lines)
