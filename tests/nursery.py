"""A process that has imported torch and the package once, and forks those that tests start: a start costs little.

What it forks is a true process: a session and an environment of its own, files for its output, an exit through the
interpreter's own end. It is reaped on request only, so that a process id stays valid until the test is done with it.
Forking is safe because nothing in the nursery has started a thread; each request makes sure of that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent
PRELOADED = (
    "torch", "torchvision.datasets.folder", "torchvision.transforms.functional", "cifar_hpc.__main__",
    "cifar_hpc.cli.inspect", "cifar_hpc.training.attempt", "cifar_hpc.data.synthetic", "cifar_hpc.cli.train",
    "faulty", "helpers", "interrupted",
)  # fmt: skip
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BYTES = 1 << 20  # of the longest message
READY_SECONDS = 300  # only bounds how long a hang lasts
STACKS = signal.SIGRTMIN  # makes a process print what each of its threads is doing
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Start:
    """One process: what it calls for its exit status, its environment, and the file that its output is appended to."""

    call: Callable[..., int | None]
    arguments: tuple[Any, ...]
    environment: Mapping[str, str]
    out: Path


# ------------------------------------------------------------------------------------------- what tests use


class Nursery:
    """The other end of the process that forks. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(READY_SECONDS)
        path = os.pathsep.join(map(str, (TESTS, PROJECT)))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(TESTS / "nursery.py"), str(theirs.fileno())],
                cwd=PROJECT,
                env={**os.environ, **THREADS, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._one_at_a_time = threading.Lock()

    def start(self, starts: Sequence[Start]) -> list[int]:
        """Fork a process for each of `starts`; returns their ids."""
        forks = [
            (dict(s.environment), str(s.out), pickle.dumps(sys.path), pickle.dumps((s.call, s.arguments)))
            for s in starts
        ]
        pids: list[int] = self._ask(forks)
        return pids

    def reap(self, pid: int) -> int:
        """Wait for the end of a process; returns its exit status, negative for the signal that ended it."""
        status: int = self._ask(pid)
        return status

    def close(self) -> None:
        """End it; what it forked dies with it."""
        self._channel.close()
        self._process.wait(READY_SECONDS)

    def _ask(self, request: object) -> Any:
        with self._one_at_a_time:
            self._channel.send(pickle.dumps(request))
            answer = self._channel.recv(BYTES)
        if not answer:
            raise RuntimeError("the nursery has died; its words are above")
        return pickle.loads(answer)


@functools.cache
def nursery() -> Nursery:
    """The nursery of this process, started when it is first needed."""
    made = Nursery()
    atexit.register(made.close)
    return made


class Process:
    """A process from the nursery, used as one of subprocess."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None  # type: int, int | None
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit status, None while it lives."""
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.returncode = nursery().reap(self.pid)
            os.close(self._pidfd)
        return self.returncode

    def wait(self, seconds: float = READY_SECONDS) -> int:
        """The exit status, once it has ended; it is killed after so many seconds."""
        if self.returncode is None and not select.select([self._pidfd], [], [], seconds)[0]:
            self.kill()
            select.select([self._pidfd], [], [])
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        """Send SIGKILL, if it lives."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def start(starts: Sequence[Start]) -> list[Process]:
    """Fork a process for each of `starts` from the nursery of this process."""
    return [Process(pid) for pid in nursery().start(starts)]


def free_port() -> int:
    """A port that nothing listens on, below the range that the kernel hands out to the sockets of other tests."""
    while True:
        port = 10_000 + int.from_bytes(os.urandom(2)) % 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ------------------------------------------------------------------------------------------- the process itself


def preload() -> None:
    """Import what most processes import, and keep it out of the garbage collector's sight."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def become(environment: dict[str, str], out: str) -> None:
    """In the fork: be a process of its own."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(output)
    # A pipe or a file is not line-buffered, and a process's last words must survive its os._exit.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(STACKS, all_threads=True)


def serve(channel: socket.socket) -> tuple[bytes, bytes] | None:
    """Answer requests until the other end is closed (None); in a fork, returns its sys.path and its call, pickled."""
    while message := channel.recv(BYTES):
        request = pickle.loads(message)
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            channel.send(pickle.dumps(os.waitstatus_to_exitcode(status)))
            continue
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "forking with threads"
        pids = []
        for environment, out, path, call in request:
            pid = os.fork()
            if pid == 0:
                channel.close()
                become(environment, out)
                return path, call
            pids.append(pid)
        channel.send(pickle.dumps(pids))
    return None


def main() -> int | None:
    """Serve; in a fork, call what it was made for."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    preload()
    found = serve(channel)
    if found is None:
        return 0
    path, content = found
    sys.path[:] = pickle.loads(path)
    call, arguments = pickle.loads(content)
    status: int | None = call(*arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
