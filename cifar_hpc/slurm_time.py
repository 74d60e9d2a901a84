"""Slurm's forms of a time limit (sbatch(1), --time)."""

from __future__ import annotations

import re

from cifar_hpc.errors import SpecError
from cifar_hpc.printable import shown

_FORMS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
_NUMBER = "([0-9]{1,9})"  # what is longer does not fit into the 32 bits that Slurm has for it


def parse_time(text: str, key: str = "--time") -> int:
    """Seconds in a Slurm time limit.

    Raises:
        SpecError: for any other form, and for no time at all.
    """
    match = re.fullmatch(rf"(?:{_NUMBER}-)?{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?", text.strip())
    if match is None:
        raise SpecError(f"{key}: {shown(text)} is not allowed; allowed: {_FORMS}, such as 90 or 1-12:00:00.")
    days, *fields = (None if g is None else int(g) for g in match.groups())
    numbers = [f for f in fields if f is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise SpecError(f"{key}: {text!r} is no time at all; allowed: {_FORMS}, more than zero.")
    return total
