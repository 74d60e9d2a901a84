"""Submitting as an act: several at once, killed half-way, under any umask. Real processes, a real local run."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT, TESTS, end_processes

from cifar_hpc.errors import RunBusyError
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

PATIENCE_SECONDS = 300  # only bounds how long a hang lasts
ENDLESS = (
    "model.width_multiplier=0.0625 model.blocks=[1,1,1] train.epochs=100000 train.batch_size=32 train.shards=1 "
    "train.cpu_threads=1 train.amp=fp32 train.device=cpu data.source=synthetic data.train_size=64 data.test_size=20 "
    "lookahead.bn_batches=1 resources.gpus_per_node=0"
).split()
AT_ONCE = 4


def killed_at_each_step(script: str, folder: Path) -> list[str]:
    """What a program that kills submissions at every step of theirs has to say."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / script), str(folder)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.process
def test_a_killed_submission_hinders_no_later_one_and_of_several_at_once_one_submits(tmp_path: Path) -> None:
    lines = killed_at_each_step("crashing_submission.py", tmp_path)
    assert sum(line.startswith("killed before") for line in lines) > 30
    assert sum(line.startswith("at once") for line in lines) > 10


@pytest.mark.process
def test_a_killed_submission_of_a_sweep_hinders_no_later_one_and_a_job_that_exists_can_run(tmp_path: Path) -> None:
    lines = killed_at_each_step("crashing_sweep.py", tmp_path)
    assert sum(line.endswith(" 0 queued") for line in lines) > 20
    assert sum(line.endswith(" 2 queued") for line in lines) > 2


@dataclass
class Local:
    """A root of its own for a run on this machine that ends only when it is told to."""

    paths: RunPaths

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A command that runs with the widest of umasks."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=outside | {"CIFAR_HPC_ROOT": str(self.paths.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0,
            **options,
        )

    def submit(self, *before: str) -> subprocess.Popen[str]:
        """submit.py, with Python options or another program before its arguments."""
        words = before or ("submit.py",)
        return self.start(*words, "--cluster", "local", "--name", "run", "--json", "--set", *ENDLESS)

    def command(self, *arguments: str) -> str:
        """What python -m cifar_hpc prints."""
        out, _ = self.start("-m", "cifar_hpc", *arguments).communicate(timeout=PATIENCE_SECONDS)
        return out

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.paths.events) if e["event"] == name]

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}: {read_jsonl(self.paths.events)}"
            time.sleep(0.1)

    def end(self) -> None:
        """Cancel the run, if there is one, and wait until its processes are gone."""
        if self.events("submitted"):
            self.command("cancel", "run")
            pid = self.events("submitted")[-1]["job_id"]
            self.wait("the end of the job", lambda: not Path(f"/proc/{pid}/fd/1").exists())


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    project = Local(RunPaths(tmp_path, "run"))
    try:
        yield project
        project.end()
    finally:
        end_processes(tmp_path)


@pytest.mark.process
def test_of_several_local_submissions_one_starts_and_nothing_is_open_to_everybody(local: Local) -> None:
    processes = [local.submit() for _ in range(AT_ONCE)]
    answers = [json.loads(p.communicate(timeout=PATIENCE_SECONDS)[0]) for p in processes]
    assert sorted(p.returncode for p in processes) == [0] + [RunBusyError.exit_code] * (AT_ONCE - 1), answers
    assert len(local.events("submitted")) == 1
    local.wait("a checkpoint and an epoch", lambda: local.events("checkpoint") and local.events("evaluated"))
    local.end()
    everything = [local.paths.root, *local.paths.root.rglob("*")]
    assert {"run.lock", "submit.lock", "train.log", "best.pt", "index.json"} <= {p.name for p in everything}
    assert [p for p in everything[1:] if not p.is_symlink() and p.lstat().st_mode & stat.S_IWOTH] == []


# submit.py, killed as soon as it has started the controller.
KILLED_AFTER_THE_START = f"""
import os, signal, subprocess
from cifar_hpc.cli import submit
popen = subprocess.Popen
def start(command, *arguments, **options):
    process = popen(command, *arguments, **options)
    if "cifar_hpc.launch.local" in command:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return process
subprocess.Popen = start
submit.main()
"""


@pytest.mark.process
def test_a_local_run_whose_submission_was_killed_is_known_to_the_next_one(local: Local) -> None:
    killed = local.submit("-c", KILLED_AFTER_THE_START)
    assert killed.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    killed.communicate()
    again = local.submit()
    answer = json.loads(again.communicate(timeout=PATIENCE_SECONDS)[0])
    assert again.returncode == RunBusyError.exit_code, answer
    local.wait("the record of the start", lambda: local.events("submitted"))
    assert len(local.events("submitted")) == 1
