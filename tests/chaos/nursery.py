"""A process that has imported torch and the package once, and forks every rank of every start.

python -m tests.chaos.nursery FD. Each request on the socket FD is one JSON object, and so is each answer:

    {"start": [{"argv": [...], "env": {...}, "out": FILE, "halts": [...]}, ...]}   ->  {"pids": [...]}
    {"reap": PID}                                                                  ->  {"status": EXIT STATUS}

A rank is a true process: a session, an environment, files for its output, an exit through the interpreter's own end. It
is reaped on request only, so that a process id stays valid until whoever asks is done with it. Forking is safe because
nothing here has started a thread; each request makes sure of that.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WORDS = 1 << 20  # bytes of the longest message
COME_UP_SECONDS = 30  # a fork comes up at once; a rank that died before it did so must not cost minutes
STACKS = signal.SIGRTMIN  # tells a rank to print what each of its threads is doing


def preload() -> None:
    """Import what a rank imports, and keep it out of the garbage collector's sight."""
    import torch
    import torchvision.datasets.folder
    import torchvision.transforms.functional  # noqa: F401

    for name in ("cli.inspect", "training.attempt", "data.synthetic", "cli.train"):
        importlib.import_module(f"cifar_hpc.{name}")
    importlib.import_module("tests.chaos.verdict")

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def become(rank: dict[str, Any]) -> None:
    """In the fork: be the process that `rank` describes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ.update(rank["env"])
    out = os.open(rank["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(out)
    # A pipe or a file is not line-buffered, and a rank's last words must survive its os._exit.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(STACKS, all_threads=True)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the other end is closed (None); in a fork, returns what it is to be."""
    while message := channel.recv(WORDS):
        request = json.loads(message)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer: dict[str, Any] = {"status": os.waitstatus_to_exitcode(status)}
        else:
            assert len(list(Path("/proc/self/task").iterdir())) == 1, "forking with threads"
            pids = []
            for rank in request["start"]:
                pid = os.fork()
                if pid == 0:
                    channel.close()
                    become(rank)
                    return rank  # type: ignore[no-any-return]
                pids.append(pid)
            answer = {"pids": pids}
        channel.send(json.dumps(answer).encode())
    return None


def main() -> int:
    """Serve; in a fork, run the command that it was made for."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    preload()
    channel.send(b'{"ready": true}')
    rank = serve(channel)
    if rank is None:
        return 0
    if rank["argv"][0] == "verdict":
        from tests.chaos.verdict import describe

        _, root, name, out = rank["argv"]
        describe(Path(root), name, Path(out))
        return 0
    from cifar_hpc.__main__ import main as cifar_hpc
    from cifar_hpc.training.distributed import rendezvous as distributed
    from tests.chaos.places import install

    install(rank["halts"])
    distributed.RENDEZVOUS_SECONDS = COME_UP_SECONDS
    if scale := os.environ.get("INITIAL_SCALE"):
        import torch

        torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=float(scale))
    return cifar_hpc(rank["argv"])


if __name__ == "__main__":
    sys.exit(main())
