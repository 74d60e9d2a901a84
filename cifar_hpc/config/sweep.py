"""Sweeps: the section `sweep` of a job file and its runs, the points."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_hpc.config.fields import build, option
from cifar_hpc.config.io import HERE, covered, flatten, in_words, merge, nested, new_spec, run_name
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.text import shown

SEED = "train.seed"
# All points are tasks of one job array, which asks for nodes once. train.device decides whether it asks for GPUs.
OF_THE_ARRAY = ("resources", "train.device")
MAX_POINTS = 10_000  # Slurm's own limit, MaxArraySize, is 1,001 where a site has not raised it
Values = dict[str, Any]  # by dotted key


@dataclass(frozen=True)
class _Limits:
    parallel: int | None = option(
        None, "points that train at the same time; null is no limit (locally 1)", low=1, high=MAX_POINTS
    )


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, what the sweep sets for it, and its spec."""

    run: str
    values: Values
    spec: Spec

    def __str__(self) -> str:
        return _words(self.values)


def expand(
    job: str,
    section: Any,
    base: Mapping[str, Any],
    set_keys: Collection[str] = (),
    folder: Path = HERE,
    root: Path = HERE,
) -> tuple[list[Point], int | None]:
    """(points of the section `sweep`, how many may train at the same time; None is no limit).

    Each point of the grid is combined with each of zip, list and seeds; seeds change fastest.

    Args:
        job: the first part of the runs' names.
        section: `grid` and `zip`, each a mapping of dotted keys to lists of values (those of zip are of one length and
            taken together), `list` (mappings of dotted keys to a value), `seeds` (a list, or how many from 0 on), and
            `parallel`.
        base: what all points have in common, as `io.load_values` returns it.
        set_keys: what --set has set, which no point may change.
        folder, root: as `io.new_spec`.

    Raises:
        SpecError: names the key, or the point whose spec makes no sense.
    """
    if not isinstance(section, dict):
        raise SpecError(f"sweep: {shown(section)} is not allowed; allowed: a mapping of {', '.join(_PARTS)}, parallel.")
    known = (*_PARTS, "parallel")
    for key in section:
        if key not in known:
            raise SpecError(f"sweep.{key}: unknown key; allowed: {', '.join(known)}." + nearest(str(key), known))
    parts = {key: value for key, value in section.items() if key in _PARTS and value is not None}
    limits = build(_Limits, {k: v for k, v in section.items() if k not in _PARTS}, "sweep")
    by_part = {part: _PARTS[part](f"sweep.{part}", value) for part, value in parts.items()}
    _check_keys(by_part, set_keys)
    axes = sorted(itertools.chain(*by_part.values()), key=lambda axis: SEED in axis[0])
    number = math.prod(len(axis) for axis in axes)
    if not axes or number > MAX_POINTS:
        raise SpecError(f"sweep: has {number if axes else 0:,} points; allowed: 1 to {MAX_POINTS:,}.")
    points: dict[str, Point] = {}
    for choice in itertools.product(*axes):
        point = _point(job, {k: v for values in choice for k, v in values.items()}, base, folder, root)
        other = points.setdefault(point.run, point)
        if other.spec != point.spec:
            raise SpecError(
                f"sweep: the points {other} and {point} are the same run, {point.run}: what they differ in is no part "
                "of what a run computes. HINT: leave it out of the sweep, and set it for all with --set."
            )
    return list(points.values()), limits.parallel


def _point(job: str, values: Values, base: Mapping[str, Any], folder: Path, root: Path) -> Point:
    for key, value in values.items():
        base = merge(base, nested(key, value))
    try:
        spec = new_spec(base, folder, root)
    except SpecError as error:
        raise SpecError(f"sweep: the point {_words(values)}: {error}") from None
    return Point(run_name(job, spec), values, spec)


def _words(values: Values) -> str:
    return " ".join(f"{key}={in_words(value)}" for key, value in values.items())


def _grid(where: str, value: Any) -> list[list[Values]]:
    return [[{key: choice} for choice in choices] for key, choices in _lists(where, value).items()]


def _zip(where: str, value: Any) -> list[list[Values]]:
    lists = _lists(where, value)
    lengths = {key: len(choices) for key, choices in lists.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise SpecError(f"{where}: {counted}; allowed: lists of one length, since their values are taken together.")
    return [[dict(zip(lists, choice, strict=True)) for choice in zip(*lists.values(), strict=True)]]


def _list(where: str, value: Any) -> list[list[Values]]:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) and v for v in value):
        raise SpecError(f"{where}: {shown(value)} is not allowed; allowed: a list of mappings of keys to a value.")
    return [[_flat(where, item) for item in value]]


def _seeds(where: str, value: Any) -> list[list[Values]]:
    if type(value) is bool or not isinstance(value, (int, list)) or value == []:
        raise SpecError(f"{where}: {shown(value)} is not allowed; allowed: a list of seeds, or how many from 0 on.")
    if isinstance(value, int) and not 1 <= value <= MAX_POINTS:
        raise SpecError(f"{where}: {shown(value)} is not allowed; allowed: 1 to {MAX_POINTS:,}, or a list of seeds.")
    return [[{SEED: seed} for seed in (range(value) if isinstance(value, int) else value)]]


_PARTS = {"grid": _grid, "zip": _zip, "list": _list, "seeds": _seeds}


def _lists(where: str, value: Any) -> dict[str, list[Any]]:
    """Check a mapping of keys to lists that are not empty; returns it by dotted keys."""
    if not isinstance(value, dict) or not value:
        raise SpecError(f"{where}: {shown(value)} is not allowed; allowed: a mapping of keys to lists of values.")
    lists = _flat(where, value)
    for key, choices in lists.items():
        if not isinstance(choices, list) or not choices:
            raise SpecError(f"{where}.{key}: {shown(choices)} is not allowed; allowed: a list of values, such as [1].")
    return lists


def _flat(where: str, value: dict[Any, Any]) -> Values:
    """Convert nested mappings to dotted keys, each of which says something of its own."""
    flat = flatten(value, where)
    for key, other in itertools.pairwise(sorted(flat, key=lambda key: key.split("."))):
        if covered(other, [key]):
            raise SpecError(f"{where}: {key} and {other} say the same twice; allowed: once.")
    return flat


# How --set reaches the values of a key, by the part of the section that has it.
_SET = {"grid": "grid.{}=[...]", "zip": "zip.{}=[...]", "list": "list=[{{{}: ...}}]", "seeds": "seeds=[...]"}


def _check_keys(by_part: Mapping[str, Sequence[Sequence[Values]]], set_keys: Collection[str]) -> None:
    """Refuse keys that a sweep cannot vary, varies twice, or that --set has set."""
    varied: list[str] = []
    for part, axis in ((part, axis) for part, axes in by_part.items() for axis in axes):
        keys = sorted({key for values in axis for key in values})
        for key in keys:
            if _overlapping(key, OF_THE_ARRAY):
                raise SpecError(
                    f"sweep: {key} is not allowed; allowed: keys outside {' and '.join(OF_THE_ARRAY)}, since all "
                    "points share one job array. HINT: submit once for each value, with --set and a --name of its own."
                )
            for other in _overlapping(key, varied):
                raise SpecError(
                    f"sweep: {other} and {key} are varied twice; allowed: once, in grid, zip, list or seeds."
                )
            for given in _overlapping(key, set_keys):
                raise SpecError(
                    f"--set {given}: the sweep varies {key}. HINT: set the section sweep itself instead, such as "
                    f"--set 'sweep.{_SET[part].format(key)}', or take the job file alone: add --set sweep=null."
                )
        varied += keys


def _overlapping(key: str, others: Iterable[str]) -> list[str]:
    """Those of `others` that set the same value as `key`, or one in its section, or its section."""
    return [other for other in others if covered(key, [other]) or covered(other, [key])]
