"""Options of sbatch: those that are passed through, those that are refused, forms of a time limit (sbatch(1))."""

import re
from collections.abc import Iterable

from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown

# Options that would break submitting, resuming or requeueing, and what to use instead.
RESERVED = {
    "array": "a job file with a section sweep",
    "chdir": "the code snapshot, where jobs run,",
    "cpus-per-task": "--cpus-per-task",
    "dependency": "--dependency",
    "error": "logs/<run>/slurm",
    "job-name": "--name",
    "no-requeue": "--no-requeue",
    "nodes": "--nodes",
    "ntasks": "--nodes and resources.tasks_per_node",
    "ntasks-per-node": "resources.tasks_per_node",
    "open-mode": "logs/<run>/slurm",
    "output": "logs/<run>/slurm",
    "parsable": "--json",
    "quiet": "--json",
    "requeue": "resources.requeue",
    "signal": "resources.warning_seconds",
    "tasks-per-node": "resources.tasks_per_node",
    "test-only": "--test-only",
    "time": "--time",
    "wait": "--follow",
    "workdir": "the code snapshot, where jobs run,",
    "wrap": "a job file",
}


def check_option_names(names: Iterable[str]) -> None:
    """Check that each name is the long name of an sbatch option that may be passed through.

    Raises:
        SpecError: names the option, and what to use instead.
    """
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
            proper = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            hint = f" HINT: did you mean '{proper}'?" if re.fullmatch(r"[a-z][a-z0-9-]{0,40}", proper) else ""
            raise SpecError(
                f"resources.sbatch: the option {shown(name)} is not allowed; allowed: long names of sbatch's options, "
                f"of lower-case letters, digits and '-', such as mail-type.{hint}"
            )
        # sbatch accepts any beginning of a name, so --out would set --output.
        reserved = [option for option in RESERVED if option.startswith(name)]
        if reserved:
            option = name if name in reserved else reserved[0]
            short = "" if name == option else f" (it is short for {option})"
            raise SpecError(
                f"resources.sbatch.{name}: is set by cifar_hpc itself{short}. HINT: use {RESERVED[option]} instead."
            )


def check_dependency(text: str | None) -> None:
    """Check that a further dependency does not disable `singleton`, which keeps a run to one job at a time.

    Raises:
        SpecError: a '?' would make Slurm wait for any one of the dependencies, singleton among them.
    """
    if text is not None and "?" in text:
        raise SpecError(
            f"resources.dependency: {shown(text)} is not allowed; allowed: dependencies joined by ',' (all of them), "
            "since '?' (any one of them) would also disable the singleton that keeps a run to one job."
        )


_FORMS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
_NUMBER = "([0-9]{1,9})"  # longer ones do not fit into Slurm's 32 bits


def parse_time(text: str, key: str = "--time") -> int:
    """Seconds in a Slurm time limit.

    Raises:
        SpecError: for any other form, and for zero.
    """
    match = re.fullmatch(rf"(?:{_NUMBER}-)?{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?", text.strip())
    if match is None:
        raise SpecError(f"{key}: {shown(text)} is not allowed; allowed: {_FORMS}, such as 90 or 1-12:00:00.")
    days, first, second, third = match.groups()
    hours, minutes, seconds = (first, second, third) if days or third else (None, first, second)
    d, h, m, s = (int(number or 0) for number in (days, hours, minutes, seconds))
    total = ((d * 24 + h) * 60 + m) * 60 + s
    if total == 0:
        raise SpecError(f"{key}: {text!r} must be more than zero; allowed: {_FORMS}.")
    return total
