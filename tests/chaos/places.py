"""Where a rank can be caught: hooks that tell the runner "here" and wait until it has done its worst.

A halt is a plain dict: {"index", "place", "nth", "rank", "socket", "after"}: at the nth time that `place` is passed by
this rank, connect to `socket`, say which halt this is, and wait for the other end to close. With `after`, only what
happens while that file exists counts.

Places are hung on functions of the package where there is one, and on system calls with the name of the file otherwise,
so that they do not depend on how the package is cut into functions. A place that no longer exists is an error at once,
where it is a function, and shows up as never reached, where it is a file.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Hit = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """Somewhere in a run.

    Attributes:
        phase: the row of the report that it belongs to.
        hang: puts a call of `hit` there.
        only_first: only rank 0 passes it.
        needs: "" or what a run must have: "ranks" (more than one), "images" (a folder of them, not decoded yet),
            "best" (an epoch to come that is the best so far), "row" (a row that no checkpoint holds).
        unit: what the times it is passed go by: "start" (once), "step", "epoch" or "save".
    """

    phase: str
    hang: Callable[[Hit], None]
    only_first: bool = False
    needs: str = ""
    unit: str = "start"


# ------------------------------------------------------------------------------------------------ kinds of hooks


def _before(module: str, name: str) -> Callable[[Hit], None]:
    """Before each call of `name` (`function` or `Class.method`) of a module."""

    def hang(hit: Hit) -> None:
        owner, attribute = _find(module, name)
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            hit()
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapper)

    return hang


def _after(module: str, name: str) -> Callable[[Hit], None]:
    def hang(hit: Hit) -> None:
        owner, attribute = _find(module, name)
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            hit()
            return result

        setattr(owner, attribute, wrapper)

    return hang


def _find(module: str, name: str) -> tuple[Any, str]:
    import importlib

    owner: Any = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    assert hasattr(owner, attribute), f"{module} has no {name} any more"
    return owner, attribute


def _file_call(call: str, pattern: str, argument: int = 0, after: bool = False) -> Callable[[Hit], None]:
    """Before (or after) each os.`call` on a file whose name matches `pattern`; the argument is a path or descriptor."""

    def hang(hit: Hit) -> None:
        original = getattr(os, call)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            mine = re.fullmatch(pattern, _name(args[argument]))
            if mine and not after:
                hit()
            result = original(*args, **kwargs)
            if mine and after:
                hit()
            return result

        setattr(os, call, wrapper)

    return hang


def _name(file: Any) -> str:
    return Path(f"/proc/self/fd/{file}").readlink().name if isinstance(file, int) else Path(file).name


def _half_write(pattern: str) -> Callable[[Hit], None]:
    """In the middle of each os.write to a file: half of the bytes are written, the rest not yet."""

    def hang(hit: Hit) -> None:
        original = os.write

        def wrapper(descriptor: int, content: bytes) -> int:
            if not re.fullmatch(pattern, _name(descriptor)):
                return original(descriptor, content)
            half = original(descriptor, content[: len(content) // 2])
            hit()
            return half + original(descriptor, content[half:])

        os.write = wrapper

    return hang


def _created(pattern: str) -> Callable[[Hit], None]:
    """Before a file is made."""

    def hang(hit: Hit) -> None:
        original = os.open

        def wrapper(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT and re.fullmatch(pattern, Path(file).name):
                hit()
            return original(file, flags, *args, **kwargs)

        os.open = wrapper

    return hang


def _half_checkpoint(hit: Hit) -> None:
    """With half of a checkpoint's bytes in its temporary file."""
    import torch

    original = torch.save

    def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(file, "write"):
            original(content, file, *args, **kwargs)
            return
        whole = io.BytesIO()
        original(content, whole, *args, **kwargs)
        data = whole.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        hit()
        file.write(data[len(data) // 2 :])

    torch.save = save


TEMPORARY = r"\.step_\d+\.pt.*\.tmp"
CHECKPOINT = r"step_\d+\.pt"

PLACES: dict[str, Place] = {
    # start-up
    "lock": Place("start", _before("cifar_hpc.training.attempt", "Attempt._open_run"), only_first=True),
    "connect": Place("process group", _before("torch.distributed", "init_process_group"), needs="ranks"),
    "connected": Place("process group", _after("torch.distributed", "init_process_group"), needs="ranks"),
    "data": Place("data", _before("cifar_hpc.training.attempt", "load_dataset")),
    "decode": Place(
        "data", _before("cifar_hpc.data.image_folder", "_rgb"), only_first=True, needs="images", unit="image"
    ),
    "cache": Place("data", _file_call("replace", r"decoded-.*\.pt", 1), only_first=True, needs="images"),
    "metrics-cut": Place("metrics cut", _file_call("fsync", r"metrics\.jsonl"), only_first=True, needs="row"),
    # steps
    "first-step": Place("first step", _before("cifar_hpc.training.engine", "Engine.step")),
    "step": Place("step", _before("cifar_hpc.training.engine", "Engine.step"), unit="step"),
    "backward": Place("step", _before("cifar_hpc.training.engine", "Engine.loss_sum"), unit="step"),
    "reduce": Place(
        "step", _before("cifar_hpc.training.distributed.shards", "ShardSum.add"), needs="ranks", unit="step"
    ),
    "agree": Place("step", _before("cifar_hpc.training.distributed.group", "Agreement.after_step"), unit="step"),
    # evaluation
    "evaluate": Place("evaluation", _before("cifar_hpc.training.trainer", "evaluate"), unit="epoch"),
    "statistics": Place("evaluation", _before("cifar_hpc.training.evaluation", "_estimate_statistics"), unit="epoch"),
    "test-images": Place("evaluation", _before("cifar_hpc.training.evaluation", "_test_sums"), unit="epoch"),
    "row": Place("evaluation", _before("cifar_hpc.training.trainer", "Trainer._row"), unit="epoch"),
    # logs
    "metrics": Place("metrics write", _file_call("write", r"metrics\.jsonl"), only_first=True, unit="epoch"),
    "metrics-half": Place("metrics write", _half_write(r"metrics\.jsonl"), only_first=True, unit="epoch"),
    "metrics-done": Place(
        "metrics write", _file_call("write", r"metrics\.jsonl", after=True), only_first=True, unit="epoch"
    ),
    "events": Place("events write", _file_call("write", r"events\.jsonl"), only_first=True, unit="save"),
    "events-half": Place("events write", _half_write(r"events\.jsonl"), only_first=True, unit="save"),
    # a checkpoint
    "save-open": Place("checkpoint", _created(TEMPORARY), only_first=True, unit="save"),
    "save-half": Place("checkpoint", _half_checkpoint, only_first=True, unit="save"),
    "save-fsync": Place("checkpoint", _file_call("fsync", TEMPORARY), only_first=True, unit="save"),
    "save-rename": Place("checkpoint", _file_call("replace", CHECKPOINT, 1), only_first=True, unit="save"),
    "save-renamed": Place("checkpoint", _file_call("replace", CHECKPOINT, 1, True), only_first=True, unit="save"),
    "best-link": Place("checkpoint", _file_call("link", CHECKPOINT), only_first=True, needs="best"),
    "best-rename": Place("checkpoint", _file_call("replace", r"best\.pt", 1), only_first=True, needs="best"),
    "index": Place("checkpoint", _file_call("replace", r"index\.json", 1), only_first=True, unit="save"),
    "retention": Place("checkpoint", _file_call("unlink", CHECKPOINT), only_first=True, unit="save"),
    # the end
    "settle": Place("shutdown", _before("cifar_hpc.training.trainer", "Trainer._wait_until_stored")),
    "finished": Place("shutdown", _before("cifar_hpc.training.attempt", "finished")),
    "disconnect": Place("shutdown", _before("cifar_hpc.training.attempt", "disconnect")),
}


def install(halts: list[dict[str, Any]]) -> None:
    """Put the hooks of this rank in place."""
    for halt in halts:
        PLACES[halt["place"]].hang(_hit(halt))


def _hit(halt: dict[str, Any]) -> Hit:
    count = itertools.count(1)

    def hit() -> None:
        if halt["after"] and not Path(halt["after"]).exists():
            return
        if next(count) != halt["nth"]:
            return
        with socket.socket(socket.AF_UNIX) as runner:
            try:
                runner.connect(halt["socket"].encode("latin1"))
                runner.sendall(f"{halt['index']} {halt['rank']}\n".encode())
                runner.recv(1)  # until it closes
            except OSError:
                return  # the runner has given this start up

    return hit
