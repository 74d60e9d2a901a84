"""The columns of `compare`: what stands in them, in words and as values to sort by, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cifar_hpc.config.io import in_words
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.runs.groups import MANY_KEYS, settings, varied_keys
from cifar_hpc.runs.results import Figure, Row
from cifar_hpc.text import printable, shown

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One column.

    name: what --sort takes.
    heading: of the table on a terminal; `long` that of a document.
    cells: of rows, in their order, all of one kind: numbers are aligned at their right.
    value: of one row, to sort by: a number, text, or None.
    """

    name: str
    heading: str
    long: str
    cells: Callable[[Sequence[Row]], list[str]]
    value: Callable[[Row], Any]
    right: bool = True


def columns(rows: Sequence[Row], *, each: bool) -> list[Column]:
    """Those that say something about `rows`, from the left to the right."""
    keys = key_columns(rows)
    chosen = [_RUN] if each or not keys else []
    chosen += keys if len(keys) <= MANY_KEYS else [_SETTINGS]
    chosen += [] if each else [_SEEDS]
    chosen += [_TEST, _BEST, _TRAIN, _EPOCHS, _TRAINING, _WALL, _RESTARTS]
    chosen += [_RANKS] if len({n for row in rows for n in row.all_of("world_sizes")}) > 1 else []
    return [*chosen, *([_STATE] if any(row.finished < len(row.members) for row in rows) else [])]


def key_columns(rows: Sequence[Row]) -> list[Column]:
    """One for each key in which the rows differ."""
    keys = varied_keys([row.group for row in rows])
    return [_changed(key, heading, rows) for key, heading in short_keys(keys).items()]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last part, where that is neither another key's as well nor the name of another column."""
    taken = {word for column in (*ALWAYS, _RUN, _SEEDS, _RANKS) for word in (column.name, column.heading)}
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: short if count[short] == 1 and short not in taken else key for key, short in last.items()}


def sort_rows(rows: Sequence[Row], by: str, shown_columns: Sequence[Column]) -> list[Row]:
    """`rows` in the order of a column's values; a leading - turns it round. Missing values come last in both.

    Raises:
        SpecError: lists the columns where there is none of that name.
    """
    known = {column.name: column for column in (*shown_columns, *key_columns(rows), *ALWAYS)}
    names = {column.heading.removesuffix(" %"): column for column in known.values()} | known
    word = by.removeprefix("-")
    column = names.get(word)
    if column is None:
        raise SpecError(
            f"--sort: {shown(by)} is no column; allowed: {', '.join(map(printable, known))}, each with or without "
            f"a leading -.{nearest(word, names)}"
        )
    value = column.value
    there = [row for row in rows if value(row) is not None]
    there.sort(key=lambda row: _order(value(row)), reverse=by.startswith("-"))
    return [*there, *(row for row in rows if value(row) is None)]


def _order(value: Any) -> tuple[int, Any]:
    """Numbers before text, lists by what they hold."""
    if isinstance(value, (bool, int, float)):
        return 0, value
    if isinstance(value, (list, tuple)):
        return 2, [_order(item) for item in value]
    return 1, str(value)


def one_line(text: str) -> str:
    """Text from a file, safe for a terminal and for one line of a table."""
    return " ".join(printable(text).split()) or MISSING


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    return MISSING if seconds is None else str(timedelta(seconds=round(seconds)))


def causes_in_words(row: Row) -> str:
    """How often the runs of a row came back, and why."""
    causes = row.causes()
    if not any(member.epoch or member.restarts for member in row.members):
        return MISSING
    return ", ".join(f"{count} {one_line(cause)}" for cause, count in causes.items()) or "0"


def state_in_words(row: Row) -> str:
    """What the runs of a row are doing that have not finished."""
    if row.group.problem:
        return f"unreadable: {row.members[0].name}"
    count = Counter(member.state for member in row.members if not member.finished)
    if len(row.members) == 1:
        return row.members[0].state
    return ", ".join(f"{n} {state}" for state, n in sorted(count.items())) or "finished"


def run_in_words(row: Row) -> str:
    """The run's name, or the first of several."""
    more = len(row.members) - 1
    return row.members[0].name + (f" and {more} more" if more else "")


def _figures(name: str) -> Callable[[Sequence[Row]], list[str]]:
    """Percentages with two decimals, and their deviations where any group has more than one run."""

    def cells(rows: Sequence[Row]) -> list[str]:
        found = [row.figure(name) for row in rows]
        deviations = [MISSING if f is None or f.std is None else f"{f.std:.2f}" for f in found]
        width = max(map(len, deviations), default=0)
        if all(text == MISSING for text in deviations):
            return [MISSING if f is None else f"{f.mean:.2f}" for f in found]
        return [
            MISSING if f is None else f"{f.mean:.2f} ± {text.rjust(width)}"
            for f, text in zip(found, deviations, strict=True)
        ]

    return cells


def _means(name: str) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: [MISSING if f is None else f"{f.mean:.2f}" for f in (row.figure(name) for row in rows)]


def _durations(name: str) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: [duration(f.mean if f else None) for f in (row.figure(name) for row in rows)]


def _mean(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        figure: Figure | None = row.figure(name)
        return figure.mean if figure else None

    return value


def _epochs(row: Row) -> str:
    done = sorted({member.epoch for member in row.members})
    of = max(member.epochs for member in row.members) or MISSING
    return f"{done[0]}/{of}" if len(done) == 1 else f"{done[0]}-{done[-1]}/{of}"


def _seeds(row: Row) -> str:
    count = len(row.members)
    return str(count) if row.finished == count else f"{row.finished}/{count}"


def _ranks(row: Row) -> str:
    sizes = sorted(row.all_of("world_sizes"))
    return ", ".join(map(str, sizes)) or MISSING


def _changed(key: str, heading: str, rows: Sequence[Row]) -> Column:
    values = [row.group.changed[key] for row in rows if key in row.group.changed]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None)

    def cell(row: Row) -> str:
        return one_line(in_words(row.group.changed[key])) if key in row.group.changed else MISSING

    return Column(
        key,
        heading,
        f"`{key}`",
        lambda rows: [cell(row) for row in rows],
        lambda row: row.group.changed.get(key),
        right=numbers,
    )


def _settings(rows: Sequence[Row]) -> list[str]:
    return [one_line(text) for text in settings([row.group for row in rows])]


def _each(cell: Callable[[Row], str]) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: [cell(row) for row in rows]


_RUN = Column("run", "run", "run", _each(run_in_words), run_in_words, right=False)
_SETTINGS = Column(
    "settings", "settings", "settings", lambda rows: _settings(rows), lambda row: row.group.changed or None, right=False
)
_SEEDS = Column("seeds", "seeds", "seeds", _each(_seeds), lambda row: len(row.members))
_TEST = Column(
    "test_accuracy", "test %", "test accuracy (%)", _figures("test_accuracy"), _mean("test_accuracy")
)  # fmt: skip
_BEST = Column("best_accuracy", "best %", "best (%)", _means("best_accuracy"), _mean("best_accuracy"))
_TRAIN = Column("train_accuracy", "train %", "train accuracy (%)", _means("train_accuracy"), _mean("train_accuracy"))
_EPOCHS = Column("epochs", "epochs", "epochs", _each(_epochs), lambda row: min(m.epoch for m in row.members))
_TRAINING = Column(
    "training_seconds", "training", "training time", _durations("training_seconds"), _mean("training_seconds")
)
_WALL = Column("wall_seconds", "wall", "wall time", _durations("wall_seconds"), _mean("wall_seconds"))
_RESTARTS = Column(
    "restarts", "restarts", "restarts", _each(causes_in_words), lambda row: sum(row.causes().values()), right=False
)
_RANKS = Column("ranks", "ranks", "processes", _each(_ranks), lambda row: row.all_of("world_sizes") or None)
_STATE = Column("state", "state", "state", _each(state_in_words), state_in_words, right=False)
# Those that one can sort by, whether they are shown or not.
ALWAYS = (_RUN, _SEEDS, _TEST, _BEST, _TRAIN, _EPOCHS, _TRAINING, _WALL, _RESTARTS, _RANKS, _STATE)
