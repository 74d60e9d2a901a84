"""Results of runs: groups of runs that differ in their seed alone, with what differs, and a row of results for each."""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any, TypeVar

from cifar_hpc.config.io import NOT_IN_NAME, covered, flatten, in_words, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import UserError
from cifar_hpc.runs.events import STARTS
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import History, number_of
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths, sweep_order
from cifar_hpc.runs.progress import DAMAGE, read_progress
from cifar_hpc.runs.state import read_state
from cifar_hpc.slurm.client import QueuedJob
from cifar_hpc.text import one_line

SEED = "train.seed"
SHARDS = "train.shards"
# Where and with how many threads a run computes is no difference in what it computes, but for the last bits.
NO_DIFFERENCE = (*NOT_IN_NAME, "train.device", "train.cpu_threads")
# Beyond so many keys that differ, as in a sweep of a list, each of which would fill a column or a legend's line alone,
# a group is told by those in which it is not as most are.
MANY_KEYS = 5
BASE = "base"
Values = dict[str, Any]  # plain values by dotted key
Item = TypeVar("Item")


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
    """The groups of `runs`: points of sweeps in their order, others by their changed values; then each run whose spec
    cannot be read, alone.

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
    shards = {values[SHARDS] for values in specs.values()} - {None}
    if len(shards) == 1:  # a run that has not started yet will get as many as all others have
        specs = {run: values | {SHARDS: max(shards)} for run, values in specs.items()}
    first = next(iter(specs.values()), {})
    keys = dict.fromkeys(key for values in specs.values() for key in values if each or key != SEED)
    differing = [key for key in keys if any(values.get(key) != first.get(key) for values in specs.values())]
    members: defaultdict[str, list[RunPaths]] = defaultdict(list)
    for run in sorted(specs, key=lambda run: (specs[run][SEED], run.name)):
        members[run.name if each else repr([specs[run].get(key) for key in differing])].append(run)
    # Other networks have other files anyway.
    shown = [key for key in differing if key.replace(".code", ".target") not in differing or not key.endswith(".code")]
    groups = [
        Group(tuple(alike), {key: specs[alike[0]].get(key) for key in shown}, tuple(specs[r][SEED] for r in alike))
        for alike in members.values()
    ]
    order = sweep_order(runs[0].root) if runs else {}
    groups.sort(key=lambda group: ([sort_key(v) for v in group.changed.values()], group.runs[0].name))
    groups.sort(key=lambda group: min(order[run.name][1] if run.name in order else len(order) for run in group.runs))
    return [*groups, *unreadable]


def varied_keys(groups: Sequence[Group]) -> list[str]:
    """The keys in which the groups differ, in the spec's order."""
    return list(dict.fromkeys(key for group in groups for key in group.changed))


def settings(groups: Sequence[Group]) -> list[str]:
    """For groups that differ in many keys, each in few: the values that most do not have, as --set takes them."""
    texts = [{key: in_words(value) for key, value in group.changed.items()} for group in groups]
    base = base_of(groups)
    return [
        " ".join(f"{key}={value}" for key, value in text.items() if value != base[key]) or (BASE if text else "")
        for text in texts
    ]


def base_of(groups: Sequence[Group]) -> dict[str, str]:
    """The value that most of the groups have of each key in which they differ, in words."""
    texts = [{key: in_words(value) for key, value in group.changed.items()} for group in groups]
    return {key: Counter(t[key] for t in texts if key in t).most_common(1)[0][0] for key in varied_keys(groups)}


def base_in_words(groups: Sequence[Group]) -> str:
    """The values of the group `base`, if the others are named by what they change in it; else empty."""
    base = base_of(groups)
    return f"{BASE}: " + one_line(" ".join(f"{k}={v}" for k, v in base.items())) if len(base) > MANY_KEYS else ""


def one_a_seed(pairs: Iterable[tuple[Item, int]], epochs: Callable[[Item], int]) -> list[Item]:
    """Of each seed the run that is furthest, the first of equal ones: runs of one seed are one observation.

    Args:
        pairs: runs with their seeds.
        epochs: how many a run has done.
    """
    best: dict[int, Item] = {}
    for item, seed in pairs:
        if seed not in best or epochs(item) > epochs(best[seed]):
            best[seed] = item
    return list(best.values())


def labels(groups: Sequence[Group]) -> list[str]:
    """Label of each group: changed keys and values, else the run's name."""
    keys = varied_keys(groups)
    short = short_keys(keys)
    words = settings(groups) if len(keys) > MANY_KEYS else [_words(group.changed, short) for group in groups]
    count = Counter(words)
    return [
        text if text and count[text] == 1 else " ".join(filter(None, (group.runs[0].name, text)))
        for group, text in zip(groups, words, strict=True)
    ]


def sweep_settings(changed: Sequence[Values]) -> list[dict[str, str]]:
    """For runs of a sweep, each with its values that differ from the defaults: the values that are not the same in all
    runs, in words by short key; under the empty key where they are many."""
    defaults = flatten(to_plain(Spec()))
    found = {key for values in changed for key in values}
    keys = [key for key in dict.fromkeys([*defaults, *sorted(found)]) if key in found]  # whatever the order of runs
    rows = [{key: values.get(key, defaults.get(key)) for key in keys} for values in changed]
    differing = [key for key in keys if any(row[key] != rows[0][key] for row in rows)]
    groups = [Group((), {key: row[key] for key in differing}) for row in rows]
    short = short_keys(differing)
    if len(differing) > MANY_KEYS:
        return [{"": text} for text in settings(groups)]
    return [{short[key]: in_words(value) for key, value in group.changed.items()} for group in groups]


def shared_label(groups: Sequence[Group]) -> str:
    """The changed values that all of `groups` have in common, in words; empty where there are none, or too many."""
    first, *others = (group.changed for group in groups)
    if len(first) > MANY_KEYS:
        return ""
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return _words(alike, short_keys(list(first)))


def _words(changed: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short[key]} {in_words(value)}" for key, value in changed.items())


def _values(run: RunPaths) -> Values:
    spec = read_frozen(run)
    if spec is None:
        raise UserError(f"{run.spec}: is not there. HINT: a run that was never submitted has none.")
    values = flatten(to_plain(spec))
    ignored = tuple(k for k in NO_DIFFERENCE if not (k == "data.root" and spec.data.in_root))
    return {key: value for key, value in values.items() if not covered(key, ignored) and value != {}}


def sort_key(value: Any) -> tuple[int, list[Any]]:
    """Key that sorts None before numbers, numbers before text, and lists by their items."""
    if value is None:
        return 0, []
    if isinstance(value, list):
        return 3, [sort_key(item) for item in value]
    return (1, [value]) if isinstance(value, (bool, int, float)) else (2, [str(value)])


def short_keys(keys: Sequence[str], taken: Container[str] = ()) -> dict[str, str]:
    """Each dotted key's last part, unless another key has the same or it is taken; schedule.name is the schedule."""
    last = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: short if count[short] == 1 and short not in taken else key for key, short in last.items()}


@dataclass(frozen=True)
class RunResult:
    """Result of one run. Values that its files do not have, or that make no sense, are None or empty.

    state: as `status` has it.
    epoch: epochs done, of `epochs`.
    test_accuracy, train_accuracy: of the last epoch, in percent; best_accuracy: the best test accuracy of any.
    training_seconds: sum of epoch_seconds, over all epochs.
    wall_seconds: of a finished run, from its first start to its end: starts, queueing for a requeue and lost work
        included, but not what passed before a person submitted it again.
    device_seconds, lost_seconds: as in `History`; None where it has not begun to train.
    device: of its last start, cpu or gpu; None where that is not known.
    peak_memory_bytes: of the rank that took most: on its GPU, on a CPU in its process.
    restarts: starts after the first, by cause.
    world_sizes: numbers of ranks with which epochs were finished, ascending.
    date: when the last epoch was finished, ISO 8601 in UTC.
    hardware, versions: in words, each that its starts had; command: of its last submission.
    """

    name: str
    state: str
    epoch: int = 0
    epochs: int = 0
    test_accuracy: float | None = None
    best_accuracy: float | None = None
    train_accuracy: float | None = None
    training_seconds: float | None = None
    wall_seconds: float | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    world_sizes: tuple[int, ...] = ()
    shards: int | None = None
    date: str | None = None
    hardware: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    command: str | None = None
    device_seconds: float | None = None
    lost_seconds: float | None = None
    device: str | None = None
    peak_memory_bytes: int | None = None

    @property
    def finished(self) -> bool:
        """True if all of its epochs are done."""
        return self.state == "finished"


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation (ddof=1) over `count` seeds; None for a single one."""

    mean: float
    std: float | None
    count: int

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for a single seed, which has none."""
        return (self.std or 0.0) / sqrt(self.count)


@dataclass(frozen=True)
class Row:
    """Results of a group of runs that differ in their seed alone.

    data: the images that all of them use, in words.
    reference: the row that differences are taken to: the base, else the first.
    """

    group: Group
    members: tuple[RunResult, ...]
    data: str = ""
    reference: "Row | None" = None

    @property
    def finished(self) -> int:
        """Number of finished members."""
        return sum(member.finished for member in self.members)

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """Members that figures are taken from: of each seed a finished one, or any if none at all has finished."""
        pairs = list(zip(self.members, self.group.seeds or (0,), strict=True))
        done = [pair for pair in pairs if pair[0].finished]
        return tuple(one_a_seed(done or pairs, lambda member: member.epoch))

    @property
    def ambiguous_seeds(self) -> list[int]:
        """Seeds whose finished runs have different results, as on different hardware."""
        results = {
            (seed, member.test_accuracy, member.train_accuracy)
            for member, seed in zip(self.members, self.group.seeds, strict=False)
            if member.finished
        }
        return sorted(seed for seed, count in Counter(seed for seed, *_ in results).items() if count > 1)

    def figure(self, name: str) -> Figure | None:
        """A field of the results as one figure; None if no member has it.

        Args:
            name: of the field, or `difference`: of the test accuracy to the reference's, over the seeds of both.
        """
        values = [value for member in self.counted if (value := getattr(member, name, None)) is not None]
        if name == "difference" and self.reference is not None and self.group is not self.reference.group:
            own, others = self._by_seed(), self.reference._by_seed()
            values = [own[seed] - others[seed] for seed in own if seed in others]
        return Figure(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None

    def _by_seed(self) -> dict[int, float]:
        """Test accuracies of the finished runs."""
        pairs = zip(self.members, self.group.seeds, strict=False)
        found = ((seed, member.test_accuracy) for member, seed in pairs if member.finished and member in self.counted)
        return {seed: accuracy for seed, accuracy in found if accuracy is not None}

    def causes(self) -> dict[str, int]:
        """Restarts of all members by cause."""
        total = sum((Counter(member.restarts) for member in self.members), Counter[str]())
        return dict(sorted(total.items()))

    def all_of(self, name: str) -> list[Any]:
        """Distinct values of a field, or of its items, over all members."""
        values = [getattr(member, name) for member in self.members]
        items = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return list(dict.fromkeys(item for item in items if item is not None))


def read_rows(groups: Sequence[Group], jobs: Mapping[str, QueuedJob | None] | None) -> list[Row]:
    """A row for each group. Damaged files lead to empty fields, never to an error.

    Args:
        jobs: as `jobs_of` returns them; None where Slurm does not answer.
    """
    rows = [Row(group, tuple(read_result(run, jobs) for run in group.runs), _data(group)) for group in groups]
    words = settings(groups) if len(varied_keys(groups)) > MANY_KEYS else []
    reference = rows[words.index(BASE) if BASE in words else 0]
    return [replace(row, reference=reference) for row in rows]


def read_result(run: RunPaths, jobs: Mapping[str, QueuedJob | None] | None) -> RunResult:
    """Result of one run."""
    state = read_state(run, jobs)
    try:
        events, rows = read_jsonl(run.events), read_jsonl(run.metrics)
    except OSError:
        return RunResult(run.name, "unreadable")
    by_epoch = {row["epoch"]: row for row in rows if _count(row, "epoch") is not None}
    last = by_epoch[max(by_epoch)] if by_epoch else {}
    past = History.of(events)
    memory: Values = {}
    with suppress(*DAMAGE):
        memory = read_progress(run).peak_memory_bytes
    starts = [event for event in events if event.get("event") in STARTS]
    seconds = [value for row in by_epoch.values() if (value := number_of(row, "epoch_seconds")) is not None]
    accuracies = (number_of(row, "test_accuracy", 100) for row in by_epoch.values())
    return RunResult(
        name=run.name,
        state=state.state,
        epoch=max(by_epoch, default=0),
        epochs=state.epochs,
        test_accuracy=number_of(last, "test_accuracy", 100),
        best_accuracy=max((value for value in accuracies if value is not None), default=None),
        train_accuracy=number_of(last, "train_accuracy", 100),
        training_seconds=sum(seconds) if seconds else None,
        wall_seconds=past.up_seconds + past.lost_seconds if state.state == "finished" else None,
        restarts=past.restart_causes,
        world_sizes=tuple(sorted({size for row in by_epoch.values() if (size := _count(row, "world_size"))})),
        shards=_count(last, "shards"),
        date=_text(last.get("time")),
        hardware=tuple(dict.fromkeys(filter(None, map(_hardware, starts)))),
        versions=tuple(dict.fromkeys(filter(None, map(_versions, starts)))),
        command=next((text for event in reversed(events) if (text := _text(event.get("command")))), None),
        device_seconds=past.device_seconds if starts else None,
        lost_seconds=past.lost_seconds if starts else None,
        peak_memory_bytes=max((size for key in memory if (size := _count(memory, key, 1e18))), default=None),
        device=next((device for start in reversed(starts) if (device := _device(start))), None),
    )


def _count(row: Mapping[str, Any], key: str, most: float = 1e9) -> int | None:
    value = row.get(key)
    return value if type(value) is int and 0 < value < most else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _part(start: Mapping[str, Any], key: str) -> Values:
    part = start.get(key)
    return part if isinstance(part, dict) else {}


def _hardware(start: Mapping[str, Any]) -> str:
    environment, processor = _part(start, "environment"), _text(_part(start, "machine").get("processor"))
    device, threads = _text(environment.get("device")), _count(environment, "threads")
    if device is None:
        return ""
    on_cpu = f", {threads} CPU thread{'s' * (threads != 1)} each" if threads else ""
    times = f"{ranks} × " if (ranks := _count(start, "world_size")) else ""
    return times + (f"{processor} ({device})" if on_cpu and processor else device) + on_cpu


def _device(start: Mapping[str, Any]) -> str | None:
    environment = _part(start, "environment")
    if _text(environment.get("device")) is None:
        return None
    return "cpu" if _count(environment, "threads") else "gpu"


def _versions(start: Mapping[str, Any]) -> str:
    found = {**_part(start, "machine"), **_part(start, "environment")}
    keys = ("cifar_hpc", "python", "torch", "torchvision", "cuda", "cudnn")
    words = [f"{key} {found[key]}" for key in keys if isinstance(found.get(key), (str, int))]
    return ", ".join(filter(None, [*words, _text(found.get("amp"))]))


def _data(group: Group) -> str:
    try:
        spec = read_frozen(group.runs[0])
    except (UserError, OSError):
        spec = None
    if spec is None:
        return ""
    data = spec.data
    words = [data.label]
    trained = data.train_size and data.train_size - (data.holdout or 0)
    words += [f"{trained:,} training images"] if trained else []
    words += [f"{data.test_size:,} test images"] if data.test_size else []
    words += [f"evaluated on {data.holdout:,} training images held out"] if data.holdout else []
    return ", ".join(words)
