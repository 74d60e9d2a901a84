"""Submits a sweep at a stub of Slurm, killed at every point of the submission. Prints one line a case.

python crashing_sweep.py FOLDER. Run by test_submission.py in a process of its own; see crashing_submission.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crashing_submission import die_at, exit_status, on_deeds, void
from stub_slurm import StubSlurm

from cifar_hpc.cli import submit
from cifar_hpc.launch import submit as launch_submit
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths, read_points
from cifar_hpc.runs.queue import queue

JOB = "data: {source: synthetic}\nsweep: {seeds: 2}\n"


class Site:
    """A root and a stub of Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.stub = folder, folder / "runs", StubSlurm(folder)
        self.job = folder / "job.yaml"
        self.job.write_text(JOB)

    def submit(self, time: str, before: Callable[[], Any] = lambda: None) -> int:
        """The exit status of a submission, in a process of its own."""
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.environ.update(self.stub.environment | {"CIFAR_HPC_ROOT": str(self.root)})
                sys.stdout = sys.stderr = (self.folder / "output").open("a")
                before()
                status = submit.main([str(self.job), "--time", time])
            finally:
                sys.stdout.flush()
                os._exit(status)
        return exit_status(pid)

    def newest(self) -> SweepPaths:
        numbers = [int(p.name) for p in SweepPaths(self.root, "job").sweep.iterdir() if p.name.isdigit()]
        return SweepPaths(self.root, "job", max(numbers))

    def check_can_run(self) -> None:
        """The jobs in the queue find all they need: who they are, their task, their code, their spec."""
        sweep = self.newest()
        runs = read_points(sweep.points)
        assert [f"{self.stub.queued()[0].split('_')[0]}_{i}" for i in range(len(runs))] == self.stub.queued()
        assert (sweep.slurm / "task.pkl").stat().st_size > 0
        assert len(list(sweep.code.glob("*/cifar_hpc/launch/worker.py"))) == 1
        assert all(read_frozen(RunPaths(self.root, run)) is not None for run in runs)
        os.environ.update(self.stub.environment)
        assert list(queue(self.root)) == runs

    def check_in_order(self, time: str) -> None:
        """A submission has ended well, and nothing of a killed one is left."""
        self.check_can_run()
        for run in (RunPaths(self.root, name) for name in read_points(self.newest().points)):
            spec = read_frozen(run)
            assert spec is not None and spec.resources.time == time
            assert read_jsonl(run.events)[-1]["event"] == "submitted"
        found = list(SweepPaths(self.root, "job").sweep.glob("[0-9]*"))
        assert found and all((folder / "points.json").exists() for folder in found), found
        left = list(self.root.rglob(".*.tmp"))
        assert not left, left


def main(folder: Path) -> None:
    import submitit.slurm.slurm  # so that the forked ones need not

    assert submitit and launch_submit
    whole = Site(folder / "whole")
    record = os.open(folder / "deeds", os.O_WRONLY | os.O_CREAT)
    assert whole.submit("60", on_deeds(lambda what: void(os.write(record, f"{what}\n".encode())))) == 0
    deeds = (folder / "deeds").read_text().splitlines()
    # The files of the snapshot are all alike: the first few and the last one stand for them.
    copies = [i for i, d in enumerate(deeds) if d.startswith("open") and d.endswith(".py") and "/code/." in d]
    moments = [i for i in range(len(deeds)) if i not in copies[2:-1]]
    assert len(moments) > 30 and len(copies) > 40, deeds
    for moment in moments:
        site = Site(folder / f"killed-{moment}")
        assert site.submit("60", die_at(moment + 1)) == -signal.SIGKILL, deeds[moment]
        queued = len(site.stub.queued())
        if queued:
            site.check_can_run()
            assert site.submit("60") == 0 and len(site.stub.queued()) == queued
            site.stub.end()
        assert site.submit("90") == 0, f"{deeds[moment]}\n{(site.folder / 'output').read_text()}"
        site.check_in_order("90")
        print(f"killed before {deeds[moment].replace(str(folder), '')}: {queued} queued", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyError):
        del os.environ["SLURM_CONF"]
    main(Path(sys.argv[1]))
