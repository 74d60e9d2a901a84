"""Groups of runs that differ in their seed alone, and the keys in which groups differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar_hpc.config.io import NOT_IN_NAME, covered, flatten, in_words, to_plain
from cifar_hpc.errors import UserError
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths

SEED = "train.seed"
SHARDS = "train.shards"
# Where and with how many threads a run computes is no difference in what it computes, but for the last bits.
NO_DIFFERENCE = (*NOT_IN_NAME, "train.device", "train.cpu_threads")
# Beyond so many keys that differ, as in a sweep of a list, each of which would fill a column or a legend's line alone,
# a group is told by those in which it is not as most are.
MANY_KEYS = 5
AS_MOST = "as most"
Values = dict[str, Any]  # plain values by dotted key


@dataclass(frozen=True)
class Group:
    """Runs with the same spec except the seed.

    changed: dotted key -> value, of the keys in which the runs that were given differ.
    seeds: that of each run, in the order of `runs`; ascending.
    problem: why the spec of the only run here cannot be read; empty where it can.
    """

    runs: tuple[RunPaths, ...]
    changed: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    problem: str = ""


def group_runs(runs: Sequence[RunPaths], *, each: bool = False) -> list[Group]:
    """The groups of `runs`, in the order of their changed values; then each run whose spec cannot be read, alone.

    Args:
        each: a group for each run, with the seed as one of the keys.
    """
    specs: dict[RunPaths, Values] = {}
    unreadable = []
    for run in runs:
        try:
            specs[run] = _values(run)
        except (UserError, OSError) as error:
            unreadable.append(Group((run,), problem=str(error)))
    _fill_in_shards(specs)
    differing = _differing(list(specs.values()), but=() if each else (SEED,))
    return [*_groups(specs, differing, each=each), *unreadable]


def varied_keys(groups: Sequence[Group]) -> list[str]:
    """The keys in which the groups differ, in the spec's order."""
    return list(dict.fromkeys(key for group in groups for key in group.changed))


def settings(groups: Sequence[Group]) -> list[str]:
    """For groups that differ in many keys, each in few: the values that most do not have, as --set takes them."""
    texts = [{key: in_words(value) for key, value in group.changed.items()} for group in groups]
    usual = {key: Counter(t[key] for t in texts if key in t).most_common(1)[0][0] for key in varied_keys(groups)}
    return [
        " ".join(f"{key}={value}" for key, value in text.items() if value != usual[key]) or (AS_MOST if text else "")
        for text in texts
    ]


def labels(groups: Sequence[Group]) -> list[str]:
    """Label of each group: changed keys and values, else the run's name."""
    keys = varied_keys(groups)
    short = _short_keys(keys)
    words = settings(groups) if len(keys) > MANY_KEYS else [_words(group.changed, short) for group in groups]
    count = Counter(words)
    return [
        text if text and count[text] == 1 else " ".join(filter(None, (group.runs[0].name, text)))
        for group, text in zip(groups, words, strict=True)
    ]


def shared_label(groups: Sequence[Group]) -> str:
    """The changed values that all of `groups` have in common, in words; empty where there are none, or too many."""
    first, *others = (group.changed for group in groups)
    if len(first) > MANY_KEYS:
        return ""
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return _words(alike, _short_keys(list(first)))


def _words(changed: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short[key]} {in_words(value)}" for key, value in changed.items())


def _values(run: RunPaths) -> Values:
    spec = read_frozen(run)
    if spec is None:
        raise UserError(f"{run.spec}: is not there. HINT: a run that was never submitted has none.")
    values = flatten(to_plain(spec))
    ignored = tuple(k for k in NO_DIFFERENCE if not (k == "data.root" and spec.data.source == "folder"))
    return {key: value for key, value in values.items() if not covered(key, ignored)}


def _fill_in_shards(specs: Mapping[RunPaths, Values]) -> None:
    """Assume that a run that has not started yet gets as many shards as all others have."""
    known = {values[SHARDS] for values in specs.values()} - {None}
    if len(known) == 1:
        for values in specs.values():
            values[SHARDS] = next(iter(known))


def _differing(specs: Sequence[Values], but: Sequence[str]) -> list[str]:
    """The keys, in the spec's order, that do not have one value in all specs."""
    keys = dict.fromkeys(key for values in specs for key in values if key not in but)
    return [key for key in keys if any(values.get(key) != specs[0].get(key) for values in specs)]


def _groups(specs: Mapping[RunPaths, Values], differing: Sequence[str], *, each: bool) -> list[Group]:
    members: dict[str, list[RunPaths]] = {}
    for run, values in specs.items():
        alike = run.name if each else repr([values.get(key) for key in differing])
        members.setdefault(alike, []).append(run)
    groups = []
    for together in members.values():
        together.sort(key=lambda run: (specs[run][SEED], run.name))
        changed = {key: specs[together[0]].get(key) for key in differing}
        groups.append(Group(tuple(together), changed, tuple(specs[run][SEED] for run in together)))
    return sorted(groups, key=lambda group: ([sort_key(v) for v in group.changed.values()], group.runs[0].name))


def sort_key(value: Any) -> tuple[int, list[Any]]:
    """Key that sorts None before numbers, numbers before text, and lists by their items."""
    if value is None:
        return 0, []
    if isinstance(value, list):
        return 3, [sort_key(item) for item in value]
    return (1, [value]) if isinstance(value, (bool, int, float)) else (2, [str(value)])


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last part, where no other key has the same; schedule.name is the schedule."""
    last = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: short if count[short] == 1 else key for key, short in last.items()}
