"""Submits at a stub sbatch: killed at every point of a submission, and several at once. Prints one line a case.

python crashing_submission.py FOLDER. Run by test_submission.py in a process of its own. Each submission is a process,
forked from this one, which has already imported what it takes and runs no thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar_hpc.cli import submit
from cifar_hpc.errors import RunBusyError
from cifar_hpc.launch import snapshot
from cifar_hpc.launch import submit as launch_submit
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

SBATCH = """#!/bin/sh
# One line of squeue a job, as cifar_hpc.slurm.client.queue asks for it.
id=$(($(cat "$QUEUE" "$QUEUE.ended" 2>/dev/null | wc -l) + 1))
echo "$id|run|PENDING|Priority|N/A||gpu|(null)|$PWD" >> "$QUEUE"
echo "Submitted batch job $id"
"""
SQUEUE = """#!/bin/sh
case "$*" in *--format*) cat "$QUEUE" 2>/dev/null;; esac
exit 0
"""
# What a submission does to the world, by the names of Python's audit events.
DEEDS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "subprocess.Popen")
AT_ONCE, ROUNDS = 6, 12


class Site:
    """A folder for runs and a queue of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.queue, self.paths = root, root / "queue", RunPaths(root / "runs", "run")
        programs = root / "bin"
        programs.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "CIFAR_HPC_ROOT": str(self.paths.root),
            "QUEUE": str(self.queue),
            "PATH": f"{programs}:/usr/bin:/bin",
        }

    def start(self, seed: int = 0, before: Callable[[], Any] = lambda: None) -> int:
        """Fork a submission; returns its process id."""
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.environ.update(self.environment)
                sys.stdout = sys.stderr = (self.root / "output").open("a")
                before()
                status = submit.main(["--name", "run", "--set", "data.source=synthetic", f"train.seed={seed}"])
            finally:
                sys.stdout.flush()
                os._exit(status)
        return pid

    def submit(self, seed: int = 0) -> int:
        """The exit status of a submission."""
        return exit_status(self.start(seed))

    def queued(self) -> int:
        """Jobs in the queue."""
        return len(self.queue.read_text().splitlines()) if self.queue.exists() else 0

    def end_jobs(self) -> None:
        """What happens to jobs in the end."""
        if self.queue.exists():
            self.queue.rename(self.queue.with_name("queue.ended"))

    def check(self, seed: int) -> None:
        """Everything is in place for a job of this seed to run, and nothing else is there."""
        frozen = read_frozen(self.paths)
        assert frozen is not None and frozen.train.seed == seed
        code = snapshot.take_snapshot(self.paths)
        assert [p.name for p in self.paths.code.iterdir()] == [code.name]
        leftovers = list(self.paths.logs.rglob(".*.tmp"))
        assert not leftovers, leftovers
        assert [e["event"] for e in read_jsonl(self.paths.events)][-1] == "submitted"


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_deeds(act: Callable[[str], None]) -> Callable[[], None]:
    """Calls `act(what)` before each deed of this process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # An open of a number gives a name to what is open already.
        opens = event == "open" and not isinstance(arguments[0], int) and isinstance(arguments[2], int)
        writes = opens and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in DEEDS or event == "fcntl.flock" or writes:
            act(f"{event} {arguments[0]}")

    return lambda: sys.addaudithook(hook)


def die_at(number: int) -> Callable[[], None]:
    count = 0

    def act(what: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_deeds(act)


def deeds(site: Site) -> list[str]:
    """What an undisturbed submission does."""
    record = site.root / "deeds"
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT)
    assert exit_status(site.start(0, on_deeds(lambda what: void(os.write(descriptor, f"{what}\n".encode()))))) == 0
    return record.read_text().splitlines()


def void(_: object) -> None:
    """For a lambda that returns nothing."""


def killed(folder: Path) -> None:
    """A submission that is killed leaves nothing that the next one, of another spec even, could stumble over."""
    what = deeds(Site(folder / "whole"))
    # The files of the snapshot are all alike: the first few and the last one stand for them.
    copies = [
        i for i, deed in enumerate(what) if deed.startswith("open") and deed.endswith(".py") and "/code/." in deed
    ]
    points = [i for i in range(len(what)) if i not in copies[3:-1]]
    assert len(points) > 15 and len(copies) > 40, what
    for number in points:
        site = Site(folder / f"killed-{number}")
        assert exit_status(site.start(0, die_at(number + 1))) == -signal.SIGKILL, what[number]
        queued = site.queued()
        if queued:
            assert site.submit(seed=0) == RunBusyError.exit_code, what[number]
            site.end_jobs()
        seed = 0 if queued else 1
        assert site.submit(seed) == 0, f"{what[number]}\n{(site.root / 'output').read_text()}"
        assert site.queued() == 1
        site.check(seed)
        print(f"killed before {what[number].replace(str(site.root), '')}: {queued} queued", flush=True)


def at_once(folder: Path) -> None:
    """Of several submissions at the same moment exactly one submits."""
    for number in range(ROUNDS):
        site = Site(folder / f"at-once-{number}")
        reader, writer = os.pipe()
        pids = [site.start(0, lambda r=reader, w=writer: (os.close(w), os.read(r, 1))) for _ in range(AT_ONCE)]
        os.close(writer)  # the end of the pipe is the start of the race
        os.close(reader)
        statuses = sorted(exit_status(pid) for pid in pids)
        assert statuses == [0] + [RunBusyError.exit_code] * (AT_ONCE - 1), statuses
        assert site.queued() == 1
        site.check(0)
        print(f"at once: {statuses}", flush=True)


def main(folder: Path) -> None:
    import submitit.slurm.slurm  # so that the forked ones need not

    assert submitit and launch_submit
    killed(folder)
    at_once(folder)


if __name__ == "__main__":
    with contextlib.suppress(KeyError):
        del os.environ["SLURM_CONF"]
    main(Path(sys.argv[1]))
