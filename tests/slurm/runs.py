"""Runs under a real Slurm, driven as a user drives them: through submit.py and python -m cifar_hpc."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, until

MOMENTS = Path(__file__).resolve().parent / "moments"
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
NOT_COMPARED = {"epoch_seconds", "images_per_second", "world_size", "restart", "job_id", "time"}
Event = dict[str, Any]


class Run:
    """One run: what a user can do with it, and what its files say."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.logs, self.checkpoints = lab.root / "logs" / name, lab.root / "checkpoints" / name
        self.moments = lab.root / "moments" / name
        self.job_id = ""

    # ------------------------------------------------------------ commands

    def submit(
        self,
        *arguments: str,
        moments: Iterable[str] = (),
        setup: Iterable[str] = (),
        srun: Iterable[str] = (),
        expect: int = 0,
    ) -> dict[str, Any]:
        """submit.py --json; returns its answer.

        Args:
            moments: rules of moments/sitecustomize.py.
            setup, srun: of the site profile.
        """
        lines = [*setup]
        if moments:
            exported = {
                "PYTHONPATH": str(MOMENTS),
                "CIFAR_HPC_MOMENTS": " ".join(moments),
                "CIFAR_HPC_MOMENTS_SEEN": str(self.moments),
            }
            lines += [f"export {key}={shlex.quote(value)}" for key, value in exported.items()]
        profile: list[str] = []
        if lines or srun:
            path = self.lab.root / "profiles" / f"{self.name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({key: value for key, value in (("setup", lines), ("srun", [*srun])) if value}))
            profile = ["--profile", str(path)]
        done = self.lab.python("submit.py", *arguments, *profile, "--name", self.name, "--json", expect=expect)
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
        """What `inspect --json` says about its newest checkpoint, found out in this process, which is quicker."""
        from cifar_hpc.cli.inspect import describe
        from cifar_hpc.training.checkpoints.store import newest_good

        found = newest_good(self.checkpoints)
        assert found is not None and found.bad == [], found
        return describe(found.path, found.state, [])

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

    def reasons(self) -> list[str]:
        """Why it asked for each of its requeues."""
        return [event["reason"] for event in self.events("requeued")]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without what may differ between two runs of one spec."""
        rows = [json.loads(line) for line in (self.logs / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]

    def log(self) -> str:
        """train.log."""
        return (self.logs / "train.log").read_text()

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

    def reached(self, place: str, restart: int = 0, rank: int = 0) -> int:
        """Wait until a moment is reached; returns the id of the process."""
        note = self.moments / f"{restart}.{rank}.{place}"

        def there() -> bool:
            assert not self.events("finished"), f"{self.name} finished before anything could happen to it"
            return note.exists()

        until(f"{self.name}: {note.name}", there, self.report)
        return int(note.read_text())

    def stopped(self, place: str, restart: int = 0, rank: int = 0) -> int:
        """Wait until a process has stopped itself at a moment (SIGSTOP); returns its id.

        Slurm sends SIGCONT along with each of its signals, which lets the process go on and see them.
        """
        pid = self.reached(place, restart, rank)
        stat = Path(f"/proc/{pid}/stat")
        until(f"{self.name}: {pid} is stopped", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        self.lab.frozen.append(pid)
        return pid

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
        python = os.fsencode(sys.executable)
        # srun's own command line has the tasks' in it
        return self._processes(lambda command: command[0] == python and b"submitit.core._submit" in command)

    def srun_processes(self) -> list[int]:
        """Process ids of its srun: the first is srun itself, the second its shepherd."""
        return sorted(self._processes(lambda command: command[0].rpartition(b"/")[2] == b"srun"))

    def _processes(self, wanted: Callable[[list[bytes]], bool]) -> list[int]:
        marks = (f"SLURM_JOB_NAME={self.name}\0".encode(), f"CIFAR_HPC_ROOT={self.lab.root}\0".encode())
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted((entry / "cmdline").read_bytes().split(b"\0")):
                    environment = (entry / "environ").read_bytes()
                    if all(mark in environment for mark in marks):
                        found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile
        return found

    # ------------------------------------------------------------ the promise

    def check_kept(self, reference: Run, failures: int = 0) -> None:
        """It finished with the weights and the log of `reference`, which nobody disturbed.

        Args:
            failures: how many of its starts failed or hung on the way.
        """
        self.wait("finished")
        self.wait_gone()
        assert len(self.events("failed", "hang")) == failures, self.report()
        assert (
            len(self.events("finished")) == 1 and self.events("finished", "failed", "hang")[-1]["event"] == "finished"
        )
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
        assert names == steps | {"best.pt", "index.json", "owner.lock"}, names
        assert set(json.loads((self.checkpoints / "index.json").read_text())["checkpoints"]) == steps

    def check_saved_where_it_stopped(self, count: int = 1) -> int:
        """The `count`-th signal ended in a checkpoint of the very step it stopped at, in an epoch's middle."""
        signalled = self.wait("signal", count=count)
        saved = [e for e in self.events("checkpoint") if seconds(e) <= seconds(signalled)][-1]
        assert (saved["step"], saved["epoch"]) == (signalled["step"], signalled["epoch"]), self.report()
        assert saved["step_in_epoch"] > 0
        assert (self.checkpoints / saved["file"]).exists()
        return int(signalled["step"])

    def check_resumed_at(self, step: int, count: int = 1) -> None:
        """Its `count`-th resumption was at `step`."""
        assert self.wait("resumed", count=count)["step"] == step, self.report()

    def check_resumed_from_newest(self, count: int = 1) -> None:
        """Its `count`-th resumption was from the newest checkpoint then on disk.

        Which one that is depends on the disk: one that comes due while another is being written is left out. It may be
        newer than the newest event, as a process may be killed after it has written a file and before it says so.
        """
        resumed = self.wait("resumed", count=count)
        saved = [e for e in self.events("checkpoint") if seconds(e) <= seconds(resumed)][-1]
        assert resumed["step"] >= saved["step"] > 0, self.report()


def seconds(event: Event) -> float:
    """When an event was written."""
    return datetime.fromisoformat(event["time"]).timestamp()


def thaw(*pids: int) -> None:
    """Let stopped processes go on, as moments/sitecustomize.py wants to be told."""
    for pid in pids:
        os.kill(pid, signal.SIGURG)  # which others ignore
        os.kill(pid, signal.SIGCONT)
