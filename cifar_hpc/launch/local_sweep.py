"""A sweep on one machine without Slurm: its points one after the other, or a few at a time.

`start` runs this module in a process of its own, from the code snapshot. Each point is started as if it were submitted
alone, so that it is found, cancelled and resumed like any run; this process only waits for room.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from cifar_hpc.errors import RunBusyError, SchedulerError, SpecError, UserError
from cifar_hpc.launch import executors as launcher
from cifar_hpc.launch import preflight as checks
from cifar_hpc.launch import submit as submission
from cifar_hpc.runs import lock as run_lock
from cifar_hpc.runs import lock as runlock
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths, SweepPaths, keep_others_out, read_points

POLL_SECONDS = 1.0
START_SECONDS = 60.0


def start(paths: SweepPaths, code: Path, parallel: int) -> str:
    """Begin; returns the process id. The process outlives this one, its terminal and Ctrl-C.

    Args:
        paths: of a submission whose points are frozen.
        parallel: how many points train at the same time.

    Raises:
        SchedulerError: where the process ends at once, with its last words.
    """
    log = paths.slurm / "controller.log"
    arguments = [sys.executable, "-m", "cifar_hpc.launch.local_sweep", str(paths.root), paths.name, str(paths.number)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*arguments, str(parallel), shlex.join(sys.argv)],
            cwd=code,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while runlock.read_owner(_lock_file(paths)).get("pid") != process.pid:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            process.wait()
            said = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SchedulerError("the sweep's controller did not start: " + " ".join(said))
        time.sleep(0.05)
    process.returncode = 0  # nobody waits for it
    return str(process.pid)


def check_none(paths: SweepPaths) -> None:
    """At most one local controller of a sweep.

    Raises:
        RunBusyError: names the process.
    """
    owner = runlock.holder(_lock_file(paths))
    if owner is not None:
        raise RunBusyError(
            f"sweep {paths.name} is being run by process {owner.get('pid', '?')} on {owner.get('host', '?')}. "
            "HINT: wait for it, or kill that process, which saves and stops its runs."
        )


def _lock_file(paths: SweepPaths) -> Path:
    return paths.sweep / "local.lock"


class Controller:
    """Starts points while there is room, until all have been started and have ended, or it is told to stop."""

    def __init__(self, paths: SweepPaths, parallel: int, command: str) -> None:
        self.paths, self.parallel, self.command = paths, parallel, command
        self.stopping = False

    def run(self) -> None:
        """Returns when there is nothing more to do."""
        lock = runlock.RunLock(_lock_file(self.paths))
        lock.acquire({"pid": os.getpid(), "host": socket.gethostname()})
        signal.signal(signal.SIGTERM, self._stop)
        waiting = [RunPaths(self.paths.root, name) for name in read_points(self.paths.points)]
        running: list[RunPaths] = []
        told: set[int] = set()
        while running or (waiting and not self.stopping):
            if waiting and len(running) < self.parallel and not self.stopping:
                run = waiting.pop(0)
                if self._start(run):
                    running.append(run)
                continue
            time.sleep(POLL_SECONDS)
            alive = {run: pid for run in running if (pid := run_lock.local_controller(run)) is not None}
            running = list(alive)
            for pid in set(alive.values()) - told if self.stopping else ():
                os.kill(pid, signal.SIGTERM)  # submitit's controller hands it to every task: the run saves and stops
                told.add(pid)
        lock.release()

    def _start(self, run: RunPaths) -> bool:
        """Submit a point; whether it runs now."""
        try:
            with submission.one_submission(run.logs, f"run {run.name}", START_SECONDS):  # the sweep's own may still end
                checks.check_free(run, on_slurm=False)
                spec = read_frozen(run)
                if spec is None:
                    raise SpecError(f"{run.spec} is missing. HINT: submit the sweep again.")
                if submission.finished_epochs(run) >= spec.train.epochs:
                    return False
                code = Path.cwd()
                job = launcher.submit_local(
                    run, spec, code, lambda job: submission.record(run, job, "local", code.name, self.command)
                )
        except (UserError, OSError) as error:
            print(f"{run.name}: not started: {error}", flush=True)
            return False
        print(f"{run.name}: started as job {job}", flush=True)
        return True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True


def main() -> None:
    """python -m cifar_hpc.launch.local_sweep ROOT SWEEP NUMBER PARALLEL COMMAND, in the folder of the code snapshot.

    COMMAND is the command line by which the user submitted the sweep; the runs' events keep it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("sweep")
    parser.add_argument("number", type=int)
    parser.add_argument("parallel", type=int)
    parser.add_argument("command")
    given = parser.parse_args()
    keep_others_out()
    Controller(SweepPaths(given.root, given.sweep, given.number), given.parallel, given.command).run()


if __name__ == "__main__":
    main()
