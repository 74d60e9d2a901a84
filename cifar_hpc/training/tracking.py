"""Trackers beside a run, such as TensorBoard: each in a process of its own (`trackers`), so that nothing it does, and
nothing it lacks, touches the run.

The run does no more than write a byte to that process after each epoch, without ever waiting, and wait a little at its
end. What the tracker shows comes from metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cifar_hpc.config.spec import TrackingSpec
from cifar_hpc.files import DIRECTORY_MODE, open_regular, read_regular
from cifar_hpc.runs.paths import PROJECT, RunPaths
from cifar_hpc.text import printable

# How long a run that has finished waits for a tracker to have shown all of it.
FINISH_SECONDS = 30.0


class Tracking:
    """The trackers of one start of a run, on rank 0.

    Args:
        on_failed: called with a tracker's name and the reason when it has failed; it is off then.
    """

    def __init__(self, paths: RunPaths, spec: TrackingSpec, on_failed: Callable[[str, str], None]) -> None:
        self.paths, self.on_failed = paths, on_failed
        self.chosen = [name for name in ("tensorboard", "wandb") if getattr(spec, name)]
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Begin to show what metrics.jsonl holds, which from now on only grows."""
        for name in self.chosen:
            try:
                self._running[name] = self._start(name)
            except OSError as error:
                self.on_failed(name, str(error))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        self.paths.tracking.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cifar_hpc.training.trackers", name, str(self.paths.root), self.paths.name]
        with os.fdopen(open_regular(self._output(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=PROJECT,  # of the run's own copy of the code
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the run
            )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def update(self) -> None:
        """metrics.jsonl has a new row. Never waits."""
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                self._ended(name)
            elif process.stdin is not None:
                with contextlib.suppress(OSError):  # a full pipe tells as much; one that has ended is noticed next time
                    os.write(process.stdin.fileno(), b"\n")

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """The run has finished. Its trackers get so many seconds together to come to an end."""
        end = time.monotonic() + seconds
        for process in self._running.values():
            if process.stdin is not None:
                process.stdin.close()
        for name, process in list(self._running.items()):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(1)  # longer only where a file system hangs
                del self._running[name]
                self.on_failed(name, f"it was not done {seconds:g} s after the run")
            else:
                self._ended(name)

    def _ended(self, name: str) -> None:
        process = self._running.pop(name)
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode == -signal.SIGALRM:
            self.on_failed(name, "it got nothing done for a minute")
        elif process.returncode != 0:
            self.on_failed(name, self._last_line(name) or f"its process ended with status {process.returncode}")

    def _last_line(self, name: str) -> str:
        try:
            lines = read_regular(self._output(name)).decode(errors="replace").split("\n")
        except OSError:
            return ""
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))

    def _output(self, name: str) -> Path:
        return self.paths.tracking / f"{name}.log"
