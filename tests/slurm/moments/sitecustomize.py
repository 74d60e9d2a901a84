"""Something happens to a task at one precise moment, so that no test has to guess one.

Python imports a module of this name as it starts (site), so a job whose PYTHONPATH leads here follows the rules in
CIFAR_HPC_MOMENTS, separated by blanks. A rule is RESTART/RANK:ACTION@PLACE, such as 0/1:SIGKILL@step:14.

RESTART, RANK   numbers, or * for all
ACTION          a signal to itself, or `raise` for an exception
PLACE           python       Python starts: no handler is installed yet
                torch        torch is about to be imported: the handlers are installed
                connect      the process group is about to be set up
                data         the data is about to be loaded
                step:N       step N (counted from 0) is about to begin
                rename:N     the checkpoint of step N is written and about to get its name

A task that has stopped (SIGSTOP) at a step goes no further when it wakes up before it knows why: a stop signal has been
handled, or a test has thawed it (SIGURG, then SIGCONT). Slurm sends SIGCONT a little before SIGTERM, in which time
a tiny model would do another step.

Each moment is noted in $CIFAR_HPC_MOMENTS_SEEN/RESTART.RANK.PLACE, with the process id, just before it happens.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

RESTART, RANK = os.environ.get("SLURM_RESTART_COUNT") or "0", os.environ.get("SLURM_PROCID", "")


def rules() -> dict[str, str]:
    """The places at which something happens to this very task, each with its action."""
    found = {}
    for rule in os.environ.get("CIFAR_HPC_MOMENTS", "").split():
        who, _, what = rule.partition(":")
        action, _, place = what.partition("@")
        restart, _, rank = who.partition("/")
        if restart in ("*", RESTART) and rank in ("*", RANK):
            found[place] = action
    return found


RULES = rules()
WOKEN = threading.Event()  # it is known why this task goes on


def reach(place: str) -> None:
    """This place is reached: do what its rule says, if there is one."""
    action = RULES.get(place)
    if action is None:
        return
    folder = Path(os.environ["CIFAR_HPC_MOMENTS_SEEN"])
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{RESTART}.{RANK}.{place}"
    half = note.with_name(f".{note.name}")
    half.write_text(str(os.getpid()))
    half.rename(note)
    if action == "raise":
        raise RuntimeError(f"on purpose, at {place}")
    # To this thread, which then goes no further; another one might take what is sent to the process, and a bit later.
    signal.pthread_kill(threading.get_ident(), getattr(signal, action))
    if action == "SIGSTOP" and place.startswith("step:"):
        while not WOKEN.is_set():
            time.sleep(0.005)  # returns to Python, where handlers of signals run
        WOKEN.clear()


def before(owner: Any, attribute: str, place: Callable[..., str]) -> None:
    """Reach `place(*arguments)` before each call of a function."""
    original = getattr(owner, attribute)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        reach(place(*arguments))
        return original(*arguments, **named)

    setattr(owner, attribute, wrapper)


def patch_job(module: ModuleType) -> None:
    """Places within the start of a run."""
    before(module, "connect", lambda *_: "connect")
    before(module, "load_dataset", lambda *_: "data")


def patch_engine(module: ModuleType) -> None:
    """Steps: (self, epoch, step in the epoch, step, rows)."""
    before(module.Engine, "step", lambda *arguments: f"step:{arguments[3]}")


def patch_preemption(module: ModuleType) -> None:
    """Know when a stop signal has been handled."""
    handle = module.StopFlag._handle

    def handle_and_wake(*arguments: Any) -> None:
        handle(*arguments)
        WOKEN.set()

    module.StopFlag._handle = handle_and_wake


PATCHES = {
    "cifar_hpc.training.attempt": patch_job,
    "cifar_hpc.training.engine": patch_engine,
    "cifar_hpc.training.process": patch_preemption,
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches modules as they are imported; importing them from here would change the start-up that is tested."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Wraps the loader of a module that is to be patched."""
        if name == "torch":
            reach("torch")
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def renamed(source: Any, target: Any, *_: Any) -> str:
    """The place that the renaming of a file is."""
    name = Path(os.fsdecode(target)).name
    return f"rename:{int(name[5:-3])}" if name.startswith("step_") and name.endswith(".pt") else ""


if RULES and "submitit.core._submit" in sys.orig_argv:
    before(os, "replace", renamed)
    before(os, "rename", renamed)
    sys.meta_path.insert(0, Finder())
    signal.signal(signal.SIGURG, lambda *_: WOKEN.set())
    reach("python")
