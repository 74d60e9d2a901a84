"""Runs under a real Slurm, driven as a user drives them: through submit.py and python -m cifar_hpc."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; a limit for what hangs, never what decides a test
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
NOT_COMPARED = {"epoch_seconds", "images_per_second", "world_size", "restart", "job_id", "time"}
Event = dict[str, Any]


def until(what: str, condition: Callable[[], Any], report: Callable[[], str] = str) -> Any:
    """What `condition` returns as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {PATIENCE:g} s\n{report()}")
        time.sleep(0.05)
    return value


class Lab:
    """A folder for runs ($CIFAR_HPC_ROOT), a copy of the project to work from, and the cluster that runs run on."""

    def __init__(self, root: Path, project: Path, cluster: Any) -> None:
        self.root, self.project, self.cluster = root, project, cluster
        self.env: dict[str, str] = cluster.env | {"CIFAR_HPC_ROOT": str(root)}
        self.frozen: list[int] = []

    def python(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run Python in the project's folder; its exit status must be `expect`."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.project,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == expect, f"{arguments}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def command(self, *arguments: str, expect: int = 0) -> str:
        """python -m cifar_hpc ...; returns what it prints."""
        return self.python("-m", "cifar_hpc", *arguments, expect=expect).stdout

    def run(self, name: str) -> Run:
        """The run called `name`, which need not exist yet."""
        return Run(self, name)

    @contextmanager
    def urgent(self, *options: str) -> Iterator[str]:
        """A job that preempts all others on the nodes it wants; gone on exit. Gives its id."""
        job = self.cluster.sbatch("-p", "urgent", "--exclusive", *options, "--wrap=sleep 600")
        try:
            yield job
        finally:
            self.cluster.run(["scancel", job])
            until(f"the urgent job {job} ended", lambda: job not in self.queued())

    def queued(self) -> list[str]:
        """Ids of the jobs in the queue."""
        done = self.cluster.run(["squeue", "--noheader", "--format=%i"])
        assert done.returncode == 0, done.stderr
        ids: list[str] = done.stdout.split()
        return ids

    def clear(self) -> None:
        """End every job, thaw every process, and have every node back in service."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        self.cluster.run(["scancel", "--user", str(os.getuid())])
        until("the queue is empty", lambda: not self.queued())
        for node in self.cluster.run(
            ["sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N"]
        ).stdout.split():
            self.cluster.scontrol("update", f"nodename={node}", "state=resume")
        idle = ["sinfo", "--noheader", "--Node", "--format=%T"]
        until("all nodes are idle", lambda: set(self.cluster.run(idle).stdout.split()) == {"idle"})


class Run:
    """One run: what a user can do with it, and what its files say."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.logs, self.checkpoints = lab.root / "logs" / name, lab.root / "checkpoints" / name
        self.job_id = ""

    # ------------------------------------------------------------ commands

    def submit(self, *arguments: str, expect: int = 0) -> dict[str, Any]:
        """submit.py --json; returns its answer."""
        done = self.lab.python("submit.py", *arguments, "--name", self.name, "--json", expect=expect)
        answer: dict[str, Any] = json.loads(done.stdout)
        if expect == 0:
            assert answer["run"] == self.name and answer["cluster"] == "slurm"
            self.job_id = answer["job_id"]
        return answer

    def state(self) -> dict[str, Any]:
        """What `status --json` says about it."""
        (state,) = json.loads(self.lab.command("status", self.name, "--json"))
        return state  # type: ignore[no-any-return]

    def inspect(self) -> dict[str, Any]:
        """What `inspect --json` says about its newest checkpoint."""
        report: dict[str, Any] = json.loads(self.lab.command("inspect", self.name, "--json"))
        assert report["verified"] and report["skipped"] == []
        return report

    def release(self) -> None:
        """Let the requeued job start now instead of in two minutes."""
        self.wait_job(JobState="PENDING", Reason="BeginTime")
        assert f"job {self.job_id} may start" in self.lab.command("requeue", self.name)

    # ------------------------------------------------------------ files

    def events(self, *kinds: str) -> list[Event]:
        """The rows of events.jsonl, those of some kinds or all."""
        try:
            text = (self.logs / "events.jsonl").read_text()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if not kinds or row["event"] in kinds]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without what may differ between two runs of one spec."""
        rows = [json.loads(line) for line in (self.logs / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]

    def report(self) -> str:
        """Everything that helps to see why a test failed."""
        out = sorted((self.logs / "slurm").glob("*.out"))
        texts = [f"--- {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-30:])
                 for p in (self.logs / "events.jsonl", self.logs / "train.log", *out) if p.exists()]  # fmt: skip
        return "\n".join([*texts, str(self.lab.cluster.run(["scontrol", "show", "job", "-o", self.job_id]).stdout)])

    # ------------------------------------------------------------ waiting

    def wait(self, *kinds: str, count: int = 1) -> Event:
        """The `count`-th event of these kinds, once it is there."""
        return until(  # type: ignore[no-any-return]
            f"{self.name}: {kinds} {count}", lambda: self.events(*kinds)[count - 1 : count], self.report
        )[0]

    def mid_epoch(self) -> bool:
        """Whether it has saved a checkpoint within an epoch that is not its first."""
        assert not self.events("finished"), f"{self.name} finished before anything could happen to it"
        return any(row["epoch"] and row["step_in_epoch"] for row in self.events("checkpoint"))

    def freeze(self) -> None:
        """Stop rank 0 where it is, so that no machine is fast enough to finish before what the test does next.

        Slurm sends SIGCONT along with each of its signals, which lets the process go on and see them.
        """
        pid = int(json.loads((self.logs / "run.lock").read_text())["pid"])
        os.kill(pid, signal.SIGSTOP)
        self.lab.frozen.append(pid)

    def job(self) -> dict[str, str]:
        """`scontrol show job` of its job."""
        fields: dict[str, str] = self.lab.cluster.job(self.job_id)
        return fields

    def wait_job(self, **fields: str) -> dict[str, str]:
        """Wait until the job's fields have these values."""

        def reached() -> dict[str, str] | None:
            job = self.job()
            if fields.items() <= job.items():
                return job
            if job["JobState"] in ENDED:  # for good, so that waiting is in vain
                pytest.fail(f"{self.name}: waiting for {fields}\n{self.report()}")
            return None

        return until(f"{self.name}: job {self.job_id} {fields}", reached, self.report)  # type: ignore[no-any-return]

    def wait_gone(self) -> dict[str, str]:
        """Wait until the job has left the queue; returns its last fields."""
        until(f"{self.name}: job {self.job_id} gone", lambda: self.job_id not in self.lab.queued(), self.report)
        return self.job()

    def task_processes(self) -> list[int]:
        """Process ids of its tasks, on whatever node of this machine."""
        wanted = (f"SLURM_JOB_NAME={self.name}\0".encode(), f"CIFAR_HPC_ROOT={self.lab.root}\0".encode())
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                # srun's own command line has the tasks' in it
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if command[0] == os.fsencode(sys.executable) and b"submitit.core._submit" in command:
                    environment = (entry / "environ").read_bytes()
                    if all(words in environment for words in wanted):
                        found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile
        return found

    # ------------------------------------------------------------ the promise

    def check_kept(self, reference: Run) -> None:
        """It finished with the weights and the log of `reference`, which nobody disturbed."""
        self.wait("finished")
        self.wait_gone()
        assert self.events("finished", "failed") == self.events("finished"), self.report()
        assert len(self.events("finished")) == 1
        mine, other = self.inspect(), reference.inspect()
        assert mine["sums"] == other["sums"], self.report()
        assert all(mine["sums"].values())
        assert (mine["step"], mine["epoch"], mine["updates"]) == (other["step"], other["epoch"], other["updates"])
        rows = self.metrics()
        assert [row["epoch"] for row in rows] == list(range(1, other["epoch"] + 1))
        assert rows == reference.metrics()
        self.check_tidy()
        assert self.state()["state"] == "finished"

    def check_tidy(self) -> None:
        """Nothing half-written lies in the folder of checkpoints, and the index knows each file."""
        names = {p.name for p in self.checkpoints.iterdir()}
        steps = {n for n in names if re.fullmatch(r"step_\d{8}\.pt", n)}
        assert names == steps | {"best.pt", "index.json"}, names
        assert set(json.loads((self.checkpoints / "index.json").read_text())["checkpoints"]) == steps

    def check_resumed_at(self, step: int, count: int = 1) -> None:
        """Its `count`-th resumption was at `step`."""
        assert self.wait("resumed", count=count)["step"] == step, self.report()


def freeze_mid_epoch(*runs: Run) -> None:
    """Freeze each run as soon as it has saved a checkpoint within an epoch that is not its first."""
    moving = set(runs)

    def all_frozen() -> bool:
        for run in [run for run in moving if run.mid_epoch()]:
            run.freeze()
            moving.remove(run)
        return not moving

    until("a checkpoint within an epoch", all_frozen, lambda: "\n".join(run.report() for run in moving))


def copy_project(source: Path, target: Path) -> Path:
    """What is needed to submit, copied to `target`."""
    for name in ("cifar_hpc", "slurm", "jobs"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "submit.py", target)
    return target
