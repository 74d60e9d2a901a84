"""A place for runs under a real Slurm: a folder, a copy of the project, and the cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; a limit for what hangs, never what decides a test
_given_up = threading.Event()


def until(what: str, condition: Callable[[], Any], report: Callable[[], str] = str) -> Any:
    """What `condition` returns as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end or _given_up.is_set():
            pytest.fail(f"{what}: not within {PATIENCE:g} s\n{report()}")
        time.sleep(0.05)
    return value


def together(*scenarios: Callable[[], None]) -> None:
    """Run scenarios side by side, each in a thread: most of their time goes by in waiting for Slurm.

    Raises:
        BaseExceptionGroup: what went wrong in each of those that failed, once all have ended.
    """
    with ThreadPoolExecutor(len(scenarios)) as pool:
        futures = [pool.submit(scenario) for scenario in scenarios]
        try:
            errors = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # Ctrl-C, or a runner that cancels: nobody waits for the others any more
            _given_up.set()
            raise
    if errors:
        raise BaseExceptionGroup(f"{len(errors)} of {len(scenarios)} scenarios failed", errors)


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

    def tool(self, *arguments: str) -> None:
        """The minicluster tool on this cluster: stop, start, lose."""
        done = self.cluster.tool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def urgent(self, *options: str) -> Iterator[str]:
        """A job that preempts others on the nodes it wants, all of them with --exclusive; gone on exit.

        Yields:
            its id.
        """
        job = self.cluster.sbatch("-p", "urgent", *options, "--wrap=sleep 600")
        try:
            yield job
        finally:
            self.cluster.run(["scancel", job])
            until(f"the urgent job {job} ended", lambda: job not in self.queued())

    def queued(self) -> list[str]:
        """Ids of the jobs in the queue, each task of an array for itself."""
        done = self.cluster.run(["squeue", "--noheader", "--array", "--format=%i"])
        assert done.returncode == 0, done.stderr
        ids: list[str] = done.stdout.split()
        return ids

    def nodes(self) -> dict[str, str]:
        """The state of each node, as sinfo prints it; a mark at its end tells of a node that does not answer."""
        lines = self.cluster.run(["sinfo", "--noheader", "--Node", "--format=%N %T"]).stdout.splitlines()
        return dict(line.split() for line in lines)

    def clear(self) -> None:
        """End every job, thaw every process, and have every daemon and node back in service."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        for daemon in ("slurmctld", *(f"slurmd-{node}" for node in ("node1", "node2"))):
            self.tool("start", daemon)
        self.cluster.run(["scancel", "--user", str(os.getuid())])
        until("the queue is empty", lambda: not self.queued())
        for node, state in self.nodes().items():
            if state.startswith(("down", "drain")):
                self.cluster.scontrol("update", f"nodename={node}", "state=resume")
        until("all nodes are idle", lambda: set(self.nodes().values()) == {"idle"}, lambda: str(self.nodes()))


def copy_project(source: Path, target: Path) -> Path:
    """What is needed to submit, copied to `target`."""
    for name in ("cifar_hpc", "slurm", "jobs"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "submit.py", target)
    return target
