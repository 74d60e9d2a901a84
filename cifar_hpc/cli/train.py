"""python -m cifar_hpc train: training without a scheduler, in one process, under torchrun or under srun.

Trains in this process, without submitit; several processes under torchrun
or srun train together. The same command again goes on from the newest good
checkpoint, with the same bits. SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU and
the first Ctrl-C save a checkpoint and stop.

Prints the lines of logs/RUN/train.log, which is written beside spec.yaml,
metrics.jsonl and events.jsonl; checkpoints go into checkpoints/RUN/. Exit
status: 0 finished, 1 failed, 2 bad spec or arguments, 4 the run is being
trained already, 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from queue import Empty, Queue
from typing import TYPE_CHECKING

from cifar_hpc.cli.parser import SEVERAL, job_file
from cifar_hpc.cli.tail import LEAST_BAR, MOST_BAR, PlainView
from cifar_hpc.runs.logs import listeners
from cifar_hpc.training.process import StopFlag, Stopwatch, launch_of

if TYPE_CHECKING:
    from cifar_hpc.runs.paths import RunPaths
    from cifar_hpc.training.attempt import Attempt

EXAMPLES = (
    "jobs/demo.yaml --set train.epochs=2",
    "jobs/improved_resnet.yaml --set data.source=synthetic train.device=cpu --name try",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.yaml", help="what to train")
    parser.add_argument("--set", metavar="KEY.PATH=VALUE", dest="overrides", help="override keys of the job", **SEVERAL)
    parser.add_argument("--name", metavar="RUN", help="the run's name (default: from what differs from the defaults)")


def main(arguments: argparse.Namespace) -> int:
    """Train a job in this process; returns the exit status (128 + signal number after a signal to stop)."""
    stop = StopFlag().install(interactive=True)
    startup = Stopwatch()
    from cifar_hpc.config.io import load_spec, run_name
    from cifar_hpc.config.validate import check
    from cifar_hpc.data.sources import source_of, with_size
    from cifar_hpc.runs.frozen_spec import freeze, resolve
    from cifar_hpc.runs.lock import lock_submission
    from cifar_hpc.runs.paths import RunPaths, check_run_name, project_root

    path = job_file(arguments.job)
    spec = load_spec(path, arguments.overrides, project_root())
    paths = RunPaths(project_root(), check_run_name(arguments.name or run_name(path.stem, spec)))
    launch, threads = launch_of(os.environ, paths.slurm / "rendezvous")
    spec = check(dataclasses.replace(spec, data=with_size(spec.data, paths.root)))
    spec = resolve(paths, spec, launch.world_size, spec.resources.cpus_per_task or threads)

    with Screen(paths, enabled=launch.rank == 0) as screen:
        from cifar_hpc.training.attempt import Attempt
        from cifar_hpc.training.context import Context

        context = Context(paths, spec, launch, stop, startup)
        paths.create()
        if launch.rank == 0:
            source_of(spec.data).fetch(spec.data, paths.root)  # reading verifies it
            submission = lock_submission(paths.logs, f"run {paths.name}")
            context.lock.acquire({"job_id": launch.job_id, "host": socket.gethostname(), "pid": os.getpid()})
            # Again: another process may have come first.
            context.spec = resolve(paths, spec, launch.world_size, spec.resources.cpus_per_task or threads)
            freeze(paths, context.spec, path.parent)
            submission.release()
        screen.attempt = attempt = Attempt(context)
        status = attempt.run()
    if not (attempt.finished and screen.moves):
        os._exit(status)  # at once: process groups whose peers are gone can take minutes to end, a blocked thread more
    stop.ignore()
    return 0


class Screen(threading.Thread):
    """The lines of the log on standard output, and on a terminal a bar below them.

    A thread, because output may block (a terminal after Ctrl-S, a pipe that nobody reads), and training must not.
    """

    def __init__(self, paths: RunPaths, enabled: bool) -> None:
        super().__init__(daemon=True)
        self.attempt: Attempt | None = None
        self.moves = True  # the output, when a line was last printed
        self._paths, self._enabled, self._view = paths, enabled, PlainView()
        self._lines: Queue[str | None] = Queue()
        self._bar = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def __enter__(self) -> Screen:
        if self._enabled:
            self.start()
            listeners[self._paths.train_log] = self.show
            for text in (f"run {self._paths.name}", f"log {self._paths.train_log}", "loading PyTorch"):
                self.show(text)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            del listeners[self._paths.train_log]
            self.show(None)

    def show(self, text: str | None) -> None:
        """Print a line, or nothing more; wait until it is there, but only a second and only where output moves."""
        self._lines.put(text)
        with (done := self._lines.all_tasks_done):
            self.moves = done.wait_for(lambda: not self._lines.unfinished_tasks, float(self.moves))

    def run(self) -> None:
        """Print until the end."""
        text: str | None = ""
        while text is not None:
            with suppress(Empty):
                text = self._lines.get(timeout=0.5 if self._bar else None)
                print("\r\x1b[K" * self._bar, end="")
                if text is not None:
                    self._view.line(text)
                self._lines.task_done()
            if self._bar and text is not None:
                print(f"\r\x1b[K{self._below()}", end="", flush=True)

    def _below(self) -> str:
        """The work under way, in one line of the terminal."""
        width = shutil.get_terminal_size().columns - 1
        trainer = self.attempt.trainer if self.attempt is not None else None
        doing = self.attempt.context.heart.doing if self.attempt is not None else "loading PyTorch"
        if trainer is None or not doing.startswith("step "):
            return doing[:width]
        done, steps = trainer.position.step_in_epoch, trainer.engine.steps_per_epoch
        before = f"epoch {trainer.position.epoch + 1}/{trainer.spec.train.epochs} "
        after = f" {done}/{steps}  {trainer.figures}"
        room = min(MOST_BAR, width - len(before + after) - 2)
        bar = f"[{('#' * (room * done // steps)).ljust(room, '-')}]" if room >= LEAST_BAR else ""
        return f"{before}{bar}{after}"[:width]
