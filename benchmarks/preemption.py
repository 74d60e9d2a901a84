"""From a preemption's signal to a durable checkpoint and to the request to requeue, on a real Slurm (minicluster).

A run of the full model is preempted again and again by a job of a partition of higher priority; all of the cluster is
this one machine. The clock starts when Python hears of the signal, after the operation in hand, such as a backward
pass. So all is in these figures but a part of the step in progress.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row, quartiles, rounds, run_part

PART, NAME, BATCH = "preemption", "preempted", 16
TOOL = ROOT / "slurm" / "minicluster" / "minicluster"
MISSING_PACKAGES = 3  # the tool's exit code
SETTINGS = [
    f"train.batch_size={BATCH}", "train.shards=1", "train.device=cpu", "train.cpu_threads=2", "train.amp=fp32",
    "data.source=synthetic", "data.train_size=10000", "data.test_size=100", "checkpoint.every_steps=1000000",
    "train.log_seconds=1",
    "resources.gpus_per_node=0",
]  # fmt: skip
# Not in the second in which the node ended the job, which it refuses; otherwise Slurm would wait for two minutes.
SOON = "StartTime=now+2"
LIMIT_SECONDS = 120.0
TARGET = "< 2 s + a step"


class Cluster:
    """A minicluster of one node, and the run on it."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "root" / "logs" / NAME
        self.directory = folder / "slurm"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_", "SQUEUE_"))}
        self.environment = clean | {
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "CIFAR_HPC_ROOT": str(folder / "root"),
        }
        self.job = ""

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TOOL), words[0], "--dir", str(self.directory), *words[1:]],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def submit(self) -> None:
        self.command(
            sys.executable, "submit.py", "--name", NAME, "--cluster", "slurm", "--partition", "gpu", "--set", *SETTINGS
        )
        self.job = self.command("squeue", "--noheader", "--format=%i", f"--name={NAME}")

    def events(self, kind: str) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.logs / "events.jsonl").read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            return [row for row in rows if row["event"] == kind]
        return []

    def wait(self, what: str, there: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while not there():
            if time.monotonic() > end:
                raise RuntimeError(f"{what}: not within {LIMIT_SECONDS:g} s\n{self._log()}")
            time.sleep(0.1)

    def usual_step(self) -> float:
        """Seconds of one, from the lines of progress but the first, which has the first step in it."""

        def rates() -> list[float]:
            return [float(rate.replace(",", "")) for rate in re.findall(r"([\d.,]+) img/s  run ETA", self._log())]

        self.wait("progress", lambda: len(rates()) > 3)
        return BATCH / statistics.median(rates()[1:])

    def _log(self) -> str:
        log = self.logs / "train.log"
        return log.read_text() if log.exists() else ""

    def preempt(self, number: int) -> None:
        """The `number`-th preemption, some steps after the start that it ends; returns once the job may start again."""
        self.wait("first step", lambda: len(self.events("first_step")) >= number)
        time.sleep(random.uniform(0.5, 1.5))  # anywhere in a step
        self.command("sbatch", "-p", "urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
        self.wait("requeue", lambda: len(self.events("requeued")) >= number)
        show = ("scontrol", "show", "job", "-o", self.job)
        self.wait("pending", lambda: "JobState=PENDING Reason=BeginTime" in self.command(*show))
        self.command("scontrol", "update", f"jobid={self.job}", SOON)


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster | None]:
    """A cluster that is up; None where Slurm's packages are missing."""
    with tempfile.TemporaryDirectory(prefix="pb") as folder:  # short, since it holds unix sockets
        cluster = Cluster(Path(folder))
        up = cluster.tool("up", "--nodes", "1", "--gpus", "0", "--no-accounting")
        if up.returncode == MISSING_PACKAGES:
            yield None
            return
        try:
            if up.returncode != 0:
                raise RuntimeError(f"minicluster up: {up.stdout}{up.stderr}")
            yield cluster
        finally:
            cluster.tool("down")


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def measure(quick: bool) -> list[Row]:
    """Rows of the time to the checkpoint and to the requeue."""
    count = 2 if quick else 30
    with _cluster() as cluster:
        if cluster is None:
            note = "not measured: Slurm's packages are missing here (make slurm-packages)"
            return [Row(PART, "signal to the request to requeue", "s", (), target=TARGET, note=note)]
        cluster.submit()
        step = cluster.usual_step()
        done = [cluster.preempt(number + 1) for number in rounds(count)]
        return _rows(cluster, step, len(done))


def _rows(cluster: Cluster, step: float, count: int) -> list[Row]:
    signals, requeues = cluster.events("signal"), cluster.events("requeued")
    if len(signals) != count or any(event["reason"] != "preemption" for event in requeues):
        raise RuntimeError(f"{len(signals)} stops, requeued for {[event['reason'] for event in requeues]}")
    heard = [_time(event) - event["seconds"] for event in signals]
    durable = [event["seconds"] for event in signals]
    asked = [_time(event) - begun for event, begun in zip(requeues, heard, strict=True)]
    starts = [event["startup"]["total"] for event in cluster.events("first_step")[1:]]
    note = f"{count} preemptions, full model, batch {BATCH}, 2 threads, a usual step {step:.2f} s"
    return [
        Row(PART, "signal to durable checkpoint", "s", quartiles(durable), note=f"{note}; max {max(durable):.2f} s"),
        Row(
            PART,
            "signal to the request to requeue",
            "s",
            quartiles(asked),
            target=TARGET,
            met=statistics.median(asked) < 2 + step,
            note=f"{note}; max {max(asked):.2f} s",
        ),
        Row(PART, "of it after the checkpoint", "s", quartiles([a - d for a, d in zip(asked, durable, strict=True)])),
        Row(PART, "requeued task to first step done", "s", quartiles(starts), note=f"{note}; max {max(starts):.2f} s"),
    ]


if __name__ == "__main__":
    run_part(measure, __doc__)
