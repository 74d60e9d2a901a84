"""Errors that a user can fix: one message, no traceback, a fixed exit code."""

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Mapping


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised out of long work when the run has to stop."""


class UserError(Exception):
    """An error that the user can fix. The message names the key or file, the value, what is allowed, and a hint."""

    exit_code = 2
    retryable = False  # whether another try may help
    everywhere = False  # whether every rank of a run raises this same error, so that one of them reports it for all


class SpecError(UserError):
    """A bad spec, argument or input file."""


class UnknownKeyError(SpecError):
    """A key that this version does not have; a later one may."""


class RunFailedError(UserError):
    """Training cannot go on, for a reason that another try would not change (such as a NaN loss)."""

    exit_code = 1


class RanksLostError(RunFailedError):
    """Some ranks of a run did not come up or are gone."""

    retryable = True


class RanksDifferError(RunFailedError):
    """The ranks of a run would not compute the same. On other nodes they may."""

    retryable = everywhere = True


class SchedulerError(UserError):
    """The scheduler refused; its own words are in the message."""

    exit_code = 3


class DoubtError(SchedulerError):
    """Slurm may have done what it was asked for, and does not say so: nothing may be undone or tried again."""


class RunBusyError(UserError):
    """The run is already queued or running, and a run has at most one writer."""

    exit_code = 4


def explain(error: UserError | ImportError | OSError) -> tuple[str, int]:
    """(message, exit status) that a command shows in place of a traceback."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = ". HINT: make room; python -m cifar_hpc du shows what the runs take" * full
        return f"{error.filename}: {error.strerror}{hint}" if error.filename else str(error), UserError.exit_code
    if not isinstance(error, ModuleNotFoundError):  # such as torch, which finds no libcudnn.so
        hint = "HINT: load the modules with which it was installed, or make setup; doctor tells more"
        return f"a Python package does not load here: {error}. {hint}", UserError.exit_code
    tracker = str(error.name).partition(".")[0] in ("tensorboard", "wandb")
    hint = "pip install -r requirements-trackers.txt" if tracker else "make setup && . .venv/bin/activate"
    message = f"the Python package '{error.name}' is not installed for {sys.executable}. HINT: {hint}"
    return message, UserError.exit_code


def without_class(summary: str) -> str:
    """The summary of an error, without the name of an exception of this project."""
    return re.sub(r"^(User|Spec|RunFailed|RanksLost|RanksDiffer|Scheduler|RunBusy)Error: ", "", summary)


def nearest(word: str, known: Iterable[str], full: Mapping[str, str] = {}) -> str:
    """` HINT: did you mean 'x'?` for the closest spelling among `known`, or an empty string.

    Upper and lower case, dashes and underscores are the same.

    Args:
        full: what to show in place of a name.
    """
    plain = {_plain(name): name for name in known}
    matches = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return f" HINT: did you mean '{full.get(plain[matches[0]], plain[matches[0]])}'?" if matches else ""


def _plain(word: str) -> str:
    return re.sub("[-_]", "", word.lower())
