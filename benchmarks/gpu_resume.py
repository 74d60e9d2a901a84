"""The promise on CUDA: `python -m cifar_hpc train` stopped, killed and continued, against a run left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_bench import Bench, Report, wrong
from benchmarks.measure import ROOT
from cifar_hpc.runs.logs import read_jsonl

LIMIT_SECONDS = 120  # of one start
VOLATILE = ("epoch_seconds", "images_per_second", "restart", "time")


def resume(bench: Bench, report: Report) -> None:
    """One run left alone and one stopped by SIGTERM, then killed by SIGKILL, for each precision; all at once."""
    precisions = ("bf16",) if bench.quick else ("bf16", "fp16")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 * len(precisions)) as pool:
        root = Path(folder)
        runs = [Run(bench, root, f"{amp}-{how}", amp) for amp in precisions for how in ("alone", "disturbed")]
        for work in [pool.submit(run.disturbed if "disturbed" in run.name else run.alone) for run in runs]:
            work.result()
        for amp, alone, disturbed in zip(precisions, runs[::2], runs[1::2], strict=True):
            one, other = alone.result(), disturbed.result()
            differing = [key for key in one if one[key] != other[key]]
            steps = " and ".join(str(event["step"]) for event in disturbed.events("resumed"))
            note = f"resumed from steps {steps} of {one['step']}" + (
                f"; differing: {', '.join(differing)}" if differing else ""
            )
            report.add(
                wrong(
                    f"{amp}: sums that differ after SIGTERM and SIGKILL from those of a run alone", len(differing), note
                )
            )


class Run:
    """One run, started as its users start it, in a root of its own."""

    def __init__(self, bench: Bench, root: Path, name: str, amp: str) -> None:
        self.root, self.name = root, name
        batch = bench.batches[0]
        self.job = root / f"{name}.yaml"
        self.job.write_text(
            yaml.safe_dump(
                bench.plain_spec(
                    batch,
                    train={"amp": amp, "epochs": 12 if bench.quick else 6, "log_seconds": 5},
                    checkpoint={"every_steps": 5 if bench.quick else 20},
                )
            )
        )

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
        report = json.loads(subprocess.run(command, env=self._environment(), capture_output=True, check=True).stdout)
        rows = read_jsonl(self.root / "logs" / self.name / "metrics.jsonl")
        metrics = [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]
        return {**report["sums"], **{key: report[key] for key in ("step", "epoch", "updates")}, "metrics": metrics}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of that kind so far."""
        return [e for e in read_jsonl(self.root / "logs" / self.name / "events.jsonl") if e["event"] == kind]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"CIFAR_HPC_ROOT": str(self.root), "PYTHONPATH": str(ROOT)}

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cifar_hpc", "train", str(self.job), "--name", self.name]
        with (self.root / f"{self.name}.out").open("ab") as out:
            return subprocess.Popen(command, env=self._environment(), stdout=out, stderr=subprocess.STDOUT)

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
