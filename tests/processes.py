"""Runs as their users start them, one process a rank: forks of the nursery, which cost no import."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import interrupted
import nursery
import yaml
from helpers import PROJECT, TINY

from cifar_hpc.config.io import merge
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.training.process import STOP_SIGNALS

STOPPED = {128 + number for number in STOP_SIGNALS}  # by the signal that a rank got
# 264 images are 8 whole batches and one of 8 images: 9 steps an epoch, 18 in all; Lookahead syncs every 5.
JOB = merge(TINY, {"checkpoint": {"every_steps": 4}})
LIMIT_SECONDS = 150  # only bounds how long a hang lasts
Process = nursery.Process | subprocess.Popen[bytes]


@dataclass
class Runs:
    """A project root with runs in it, and the processes that are started there."""

    root: Path
    processes: list[Process] = field(default_factory=list)

    def start(self, name: str, world: int, *overrides: str, **how: Any) -> list[int]:
        """Train until all processes have ended; their exit statuses by rank (under torchrun: its own)."""
        return self.wait(self.begin(name, world, *overrides, **how))

    def begin(
        self, name: str, world: int, *overrides: str, interrupt: str = "", torchrun: bool = False
    ) -> list[Process]:
        """Begin to train; the processes by rank.

        Args:
            torchrun: start the ranks with it, each as a new interpreter.
        """
        self.root.mkdir(exist_ok=True)
        job = self.root / "tiny.yaml"
        job.write_text(yaml.safe_dump(JOB))
        arguments = ["train", str(job), "--name", name, *(word for o in overrides for word in ("--set", o))]
        common = os.environ | nursery.THREADS | {
            "CIFAR_HPC_ROOT": str(self.root), "PYTHONPATH": str(PROJECT), "INTERRUPT": interrupt,
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        started: list[Process] = []
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            with (self.root / f"{name}.0.out").open("a") as out:
                command = [*launcher, interrupted.__file__, *arguments]
                started.append(subprocess.Popen(command, env=common, stdout=out, stderr=out))
        else:
            port = nursery.free_port()
            place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            starts = [
                nursery.Start(
                    interrupted.play,
                    (arguments,),
                    common | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    self.root / f"{name}.{rank}.out",
                )
                for rank in range(world)
            ]
            started += nursery.start(starts)
        self.processes += started
        return started

    def wait(self, started: list[Process]) -> list[int]:
        """Their exit statuses; a process that stopped itself is killed once all others have ended."""
        end = time.monotonic() + LIMIT_SECONDS
        while any(process.poll() is None and not stopped(process.pid) for process in started):
            assert time.monotonic() < end, "some processes do not end"
            time.sleep(0.05)
        for process in started:
            process.kill()
        return [process.wait() for process in started]

    def output(self, name: str) -> str:
        return "\n".join(p.read_text() for p in sorted(self.root.glob(f"{name}.*.out")))

    def finish(self, name: str, world: int, *overrides: str, **how: Any) -> None:
        """Train to the end."""
        assert set(self.start(name, world, *overrides, **how)) == {0}, self.output(name)

    def stop(self, name: str, world: int, *overrides: str, interrupt: str, torchrun: bool = False) -> None:
        """Train until all ranks have stopped together, with a checkpoint."""
        statuses = self.start(name, world, *overrides, interrupt=interrupt, torchrun=torchrun)
        assert set(statuses) <= ({1} if torchrun else STOPPED), self.output(name)

    def kill(self, name: str, world: int, *overrides: str, interrupt: str) -> None:
        """Train until every process kills itself, as a lost node does."""
        statuses = self.start(name, world, *overrides, interrupt=interrupt)
        assert set(statuses) == {-signal.SIGKILL}, self.output(name)

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.root / "logs" / name / "events.jsonl") if e["event"] in kinds]

    def resumed(self, name: str) -> tuple[int, int, int]:
        """Where the latest start of the run began: step, epochs completed, step in the epoch."""
        last = self.events(name, "resumed")[-1]
        return last["step"], last["epoch"], last["step_in_epoch"]

    def copy(self, old: str, new: str) -> None:
        """A second run with the files of the first."""
        for kind in ("logs", "checkpoints"):
            shutil.copytree(self.root / kind / old, self.root / kind / new)

    def log(self, name: str) -> str:
        return (self.root / "logs" / name / "train.log").read_text()


def command(root: Path, *arguments: str) -> tuple[int, str]:
    """python -m cifar_hpc ARGUMENTS as one process, with `root` as CIFAR_HPC_ROOT; its exit status and output."""
    environment = os.environ | nursery.THREADS | {"CIFAR_HPC_ROOT": str(root)}
    with tempfile.NamedTemporaryFile("r") as out:
        (process,) = nursery.start([nursery.Start(interrupted.play, (list(arguments),), environment, Path(out.name))])
        return process.wait(), out.read()


def stopped(pid: int) -> bool:
    """Whether a process has got SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
