"""Runs as users start them: stopped, killed and continued; and five epochs, by part.

As a program this is cifar_hpc itself, with a clock around steps, evaluations and checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.gpu import Report
from benchmarks.gpu_bench import GRAPHS, SAME, TRAINING_TARGETS, Bench, figure, target_of
from benchmarks.measure import ROOT
from cifar_hpc.runs.logs import read_jsonl

LIMIT_SECONDS = 120  # of one start
VOLATILE = ("epoch_seconds", "images_per_second", "restart", "time")
Spans = dict[str, list[tuple[float, float]]]  # beginning and end of each call, by the function's name
SPANS = "spans.json"  # in the project's root
START_TARGET, BOUNDARY_TARGET = "< 15 s", "< 5 %"
EPOCHS = 400  # of the report's training


def images(count: int) -> tuple[Any, ...]:
    """data.target: noise, `count` images to train on and a fifth of that to test on."""
    random = np.random.default_rng(0)
    parts: list[Any] = []
    for size in (count, count // 5):
        parts += [random.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8), random.integers(0, 10, size)]
    return *parts, [str(number) for number in range(10)]


def resume(bench: Bench, report: Report) -> None:
    """One run left alone, and beside it one stopped by SIGTERM, then killed by SIGKILL; with CUDA graphs, too."""
    count, number, every = (256, 12, 5) if bench.quick else (10_000, 6, 20)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def run(name: str, graph: str) -> Run:
            spec = bench.plain_spec(bench.batches[0], count, epochs=number, log_seconds=5, amp="bf16", graph=graph)
            return Run(Path(folder), name, spec | {"checkpoint": {"every_steps": every}})

        alone, disturbed = run("alone", "off"), {graph: run(f"graph-{graph}", graph) for graph in GRAPHS}
        first, *others = [pool.submit(alone.alone), *(pool.submit(other.disturbed) for other in disturbed.values())]
        for work, (graph, other) in zip(others, disturbed.items(), strict=True):
            first.result()
            work.result()
            one, two = alone.result(), other.result()
            changed = [key for key in one if one[key] != two[key]]
            steps = " and ".join(str(event["step"]) for event in other.events("resumed"))
            note = f"resumed from steps {steps} of {one['step']}; sha256 {one['fast_weights'][:16]} {' '.join(changed)}"
            what = f"bf16, graph={graph}: sums that SIGTERM and SIGKILL have changed from those of an eager run alone"
            report.add(figure(what, "", [len(changed)], SAME, note))


def epochs(bench: Bench, report: Report) -> None:
    """Runs of some epochs, each in a process of its own: eager, and with CUDA graphs."""
    count, number = (256, 3) if bench.quick else (50_000, 5)
    for graph in GRAPHS:
        spec = bench.plain_spec(bench.batches[0], count, epochs=number, graph=graph)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), "epochs", spec, program="benchmarks.gpu_runs")
            run.alone()
            startup = run.events("first_step")[0]["startup"]
            parts = epochs_of(json.loads((Path(folder) / SPANS).read_text()))
        laps = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in startup.items())
        boundary = [100 * (1 - steps / whole) for steps, whole in zip(parts["steps"], parts["whole"], strict=True)]
        minutes = [(startup["total"] + EPOCHS * whole) / 60 for whole in parts["whole"]]
        what, note = f"graph={graph}", f"{count} images of noise, without the first of {number} epochs"
        report.add(
            figure(f"{what}: start to first step", "s", [startup["total"]], START_TARGET, f"s: {laps}"),
            *(figure(f"{what}, an epoch: {part}", "s", seconds, note=note) for part, seconds in parts.items()),
            figure(f"{what}, an epoch: all but its steps", "%", boundary, BOUNDARY_TARGET, note),
            figure(f"{what}: its steps", "img/s", [count / seconds for seconds in parts["steps"]], note=note),
            figure(f"{what}: {EPOCHS} epochs", "min", minutes, target_of(TRAINING_TARGETS, bench.gpu), note),
        )


class Run:
    """One run, started as its users start it.

    Args:
        root: of the project, shared by runs.
        program: the module that is run, with the arguments of cifar_hpc.
    """

    def __init__(self, root: Path, name: str, spec: dict[str, Any], program: str = "cifar_hpc") -> None:
        self.root, self.name, self.program = root, name, program
        self.job = root / f"{name}.yaml"
        self.job.write_text(yaml.safe_dump(spec))

    def alone(self) -> None:
        """From the first step to the last."""
        self._end(self._start(), 0)

    def disturbed(self) -> None:
        """Stopped after a checkpoint, continued, killed after another one, continued to the end."""
        for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
            process = self._start()
            self._wait_for_checkpoint(process)
            process.send_signal(number)
            self._end(process, status)
        self._end(self._start(), 0)
        if len(self.events("resumed")) != 2:
            raise RuntimeError(f"{self.name} was to be resumed twice:\n{self._output()}")

    def result(self) -> dict[str, Any]:
        """What must not depend on how the run came to its end."""
        command = [sys.executable, "-m", "cifar_hpc", "inspect", self.name, "--json"]
        report = json.loads(subprocess.run(command, env=self.environment(), capture_output=True, check=True).stdout)
        metrics = [{key: value for key, value in row.items() if key not in VOLATILE} for row in self.rows("metrics")]
        return {**report["sums"], **{key: report[key] for key in ("step", "epoch", "updates")}, "metrics": metrics}

    def rows(self, log: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl or events.jsonl so far."""
        return read_jsonl(self.root / "logs" / self.name / f"{log}.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of that kind so far."""
        return [event for event in self.rows("events") if event["event"] == kind]

    def environment(self) -> dict[str, str]:
        """The variables of its processes. Packages that are found by PYTHONPATH are found there, too."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return os.environ | {"CIFAR_HPC_ROOT": str(self.root), "PYTHONPATH": path}

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.program, "train", str(self.job), "--name", self.name]
        with (self.root / f"{self.name}.out").open("ab") as out:
            return subprocess.Popen(command, env=self.environment(), stdout=out, stderr=subprocess.STDOUT)

    def _wait_for_checkpoint(self, process: subprocess.Popen[bytes]) -> None:
        """Until this start of the run has written one."""
        before, end = len(self.events("checkpoint")), time.monotonic() + LIMIT_SECONDS
        while len(self.events("checkpoint")) == before:
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"{self.name} wrote no checkpoint in time to be stopped:\n{self._output()}")
            time.sleep(0.01)

    def _end(self, process: subprocess.Popen[bytes], expected: int) -> None:
        try:
            status = process.wait(LIMIT_SECONDS)
        finally:
            process.kill()
            process.wait()
        if status != expected:
            raise RuntimeError(f"{self.name} ended with status {status}, not {expected}:\n{self._output()}")

    def _output(self) -> str:
        path = self.root / "logs" / self.name / "train.log"
        log = path.read_text() if path.exists() else ""
        return "\n".join([*(self.root / f"{self.name}.out").read_text().splitlines()[-15:], *log.splitlines()[-15:]])


def epochs_of(spans: Spans) -> dict[str, list[float]]:
    """Seconds of each epoch but the first, and of its parts. An epoch begins with its first step.

    Its steps end where its evaluation begins, before which the training loop waits for the device.
    """
    ends = [began for began, _ in spans["evaluate"]]
    begins = [next(began for began, _ in spans["step"] if began > end) for end in (0.0, *ends[:-1])]
    parts: dict[str, list[float]] = {"whole": [], "steps": [], "evaluation": [], "checkpoints": []}
    for (begin, end), steps_end in list(zip(pairwise([*begins, spans["train"][0][1]]), ends, strict=True))[1:]:
        parts["whole"].append(end - begin)
        parts["steps"].append(steps_end - begin)
        for part, function in (("evaluation", "evaluate"), ("checkpoints", "save")):
            parts[part].append(sum(b - a for a, b in spans.get(function, []) if begin <= a < end))
    return parts


def put_clock(owner: Any, name: str, spans: Spans) -> None:
    """Time the calls of a function; after those of `train` all times are written."""
    function = getattr(owner, name)

    @wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        result = function(*arguments, **options)
        spans.setdefault(name, []).append((began, time.monotonic()))
        if name == "train":
            Path(os.environ["CIFAR_HPC_ROOT"], SPANS).write_text(json.dumps(spans))
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    from cifar_hpc.__main__ import main
    from cifar_hpc.training import trainer

    clocks: Spans = {}
    for owner, name in (
        (trainer.Engine, "step"), (trainer, "evaluate"), (trainer.Trainer, "save"), (trainer.Trainer, "train")
    ):  # fmt: skip
        put_clock(owner, name, clocks)
    sys.exit(main())
