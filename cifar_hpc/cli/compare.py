"""python -m cifar_hpc compare: a table of runs. Runs that differ only in their seed share a row."""

import argparse
import csv
import io
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from cifar_hpc.cli.terminal import PLAIN, Column, Style, fit, lay_out, paint, use_colour
from cifar_hpc.config.io import in_words
from cifar_hpc.errors import SchedulerError, SpecError, nearest
from cifar_hpc.runs.paths import find_runs, project_root
from cifar_hpc.runs.results import (
    MANY_KEYS,
    Group,
    Row,
    group_runs,
    read_rows,
    settings,
    short_keys,
    sort_key,
    varied_keys,
)
from cifar_hpc.runs.state import ANSWER_SECONDS, jobs_of
from cifar_hpc.text import in_markdown, one_line, printable, shown

DESCRIPTION = """\
A row for each setting, with only the keys in which the runs differ; runs that
differ in nothing but the seed are one row, mean and standard deviation. --each
gives every run a row of its own."""
EXAMPLES = ("'dropout-*'", "'dropout-*' 'activation-*' --sort=-test_accuracy --markdown")

MISSING = "-"
# Columns by their names, as --sort takes them: those that have the name as their heading, and the figures.
WORDS = ("run", "settings", "seeds", "epochs", "restarts", "ranks", "state")
FIGURES = {  # name: (heading on a terminal, heading in a document)
    "test_accuracy": ("test %", "test accuracy (%)"),
    "best_accuracy": ("best %", "best (%)"),
    "train_accuracy": ("train %", "train accuracy (%)"),
    "training_seconds": ("training", "training time"),
    "wall_seconds": ("wall", "wall time"),
}
TAKEN = {*WORDS, *FIGURES, *(heading for heading, _ in FIGURES.values())}
LONG_HEADINGS = {"ranks": "processes", **dict(FIGURES.values())}
# Further columns of a document, so that readers know how a row was made.
ORIGINS = ("hardware", "versions", "data", "date", "command")
# Columns that are left out of a narrow table, the first one first.
DROPPED = ("ranks", "wall", "train %", "best %", "epochs", "restarts", "training")
# Columns whose cells may be broken on a narrow terminal, and after what.
SEPARATORS = {"restarts": ", ", "settings": " "}
TEXTS = ("run", "settings", "restarts", "state")  # columns that are aligned at the left
NOTE = (
    "Accuracies are those of the last epoch, as mean ± sample standard deviation over the seeds that have finished "
    "(all, where none has); best is the mean of each run's best epoch. Training time is the sum of a run's epochs, "
    "wall time includes its restarts; both are means. Restarts are summed over the seeds."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="PATTERN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--sort", metavar="COLUMN", help="a column, ascending; descending: --sort=-COLUMN")
    parser.add_argument("--each", action="store_true", help="a row for each run, seeds apart")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="machine-readable")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="for a spreadsheet")
    form.add_argument("--markdown", action="store_const", const="markdown", dest="form", help="for a README")


def main(arguments: argparse.Namespace) -> int:
    """Print the results of the runs.

    Raises:
        SpecError: no run matches a pattern, or there is no such column.
    """
    root = project_root()
    groups = group_runs(find_runs(root, arguments.runs), each=arguments.each)
    rows = read_groups(groups)
    if arguments.sort is not None:
        rows = sort_rows(rows, arguments.sort, all_columns(rows, each=arguments.each))
    columns = [column for column in all_columns(rows, each=arguments.each) if column.shown]
    if arguments.form == "json":
        print(as_json(rows))
    elif arguments.form == "csv":
        print(as_csv(rows), end="")
    elif arguments.form == "markdown":
        print(as_markdown(rows, columns), end="")
    elif sys.stdout.isatty():
        print_on_terminal(columns)
    else:
        print(*lay_out(columns), sep="\n")
    for group in groups:
        if group.problem:
            print(f"warning: {group.runs[0].name}: {printable(group.problem)}", file=sys.stderr)
    return 0


def read_groups(groups: Sequence[Group]) -> list[Row]:
    """The rows of the table, with the states of the runs, if Slurm answers; else a warning."""
    try:
        jobs = jobs_of([run for group in groups for run in group.runs], ANSWER_SECONDS)
    except SchedulerError as error:
        jobs = None
        print(f"warning: the state of unfinished runs is not known: {printable(str(error))}", file=sys.stderr)
    return read_rows(groups, jobs)


def as_json(rows: Sequence[Row]) -> str:
    """An object with the list `rows`, in the table's order; keys are only ever added, and all are always there.

    runs: names. changed: {dotted key: value}, of the keys in which the runs given differ. seeds: of the runs.
    finished: how many runs have finished. counted: names of those that figures are taken from: the finished ones, or
        all of them where none has finished.
    test_accuracy, best_accuracy, train_accuracy (%), training_seconds, wall_seconds: null, or an object of mean, std
        (sample standard deviation, ddof=1; null for a single run) and count (of runs). Accuracies are of the last
        epoch, best_accuracy of each run's best one. wall_seconds are of finished runs only.
    restarts: {cause: number}, summed over the runs. data: the images, in words. problem: why a run cannot be read;
        else null.
    members: a list with an object for each run: name, state, epoch, epochs, the five figures as numbers or null,
        restarts, world_sizes, shards, date (of the last epoch, ISO 8601 in UTC), hardware and versions (lists of
        text, one for each that its starts had), command.
    """
    plain = [
        {
            "runs": [member.name for member in row.members],
            "changed": row.group.changed,
            "seeds": row.group.seeds,
            "finished": row.finished,
            "counted": [member.name for member in row.counted],
            **{name: asdict(figure) if (figure := row.figure(name)) else None for name in FIGURES},
            "restarts": row.causes(),
            "data": row.data or None,
            "problem": row.group.problem or None,
            "members": [asdict(member) for member in row.members],
        }
        for row in rows
    ]
    return json.dumps({"rows": plain}, indent=1, allow_nan=False)


def as_csv(rows: Sequence[Row]) -> str:
    """RFC 4180: a header and a line a row, with unrounded numbers and empty fields for missing values.

    Lists (runs, seeds, hardware, ...) are one field, separated by '; '.
    """
    keys = varied_keys([row.group for row in rows])
    records = [_csv_record(row, keys) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0])
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _csv_record(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    causes = row.causes()
    figures = {name: row.figure(name) for name in FIGURES}
    return {
        "runs": _joined(member.name for member in row.members),
        **{key: _csv_value(row.group.changed.get(key)) for key in keys},
        "seeds": _joined(row.group.seeds),
        "finished": row.finished,
        "state": one_line(_state(row)),
        "epochs_done": _joined(dict.fromkeys(member.epoch for member in row.members)),
        "epochs": _joined(row.all_of("epochs")),
        **{f"{name}_{part}": f and getattr(f, part) for name, f in figures.items() for part in ("mean", "std")},
        "restarts": sum(causes.values()),
        "restart_causes": _joined(f"{count} {one_line(cause)}" for cause, count in causes.items()),
        **{name: _joined(map(_csv_value, _values(row, name))) for name in ("world_sizes", "shards", *ORIGINS)},
    }


def _joined(values: Any) -> str:
    return "; ".join(map(str, values))


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value)
    return one_line(value) or MISSING if isinstance(value, str) else value


@dataclass(kw_only=True)
class CompareColumn(Column):
    """A column with a value to sort by for each row.

    name: as --sort takes it; of a key in which the runs differ, the dotted key.
    values: numbers, text, or None where missing.
    shown: the table has it; hidden ones only sort.
    """

    name: str
    values: Sequence[Any]
    shown: bool


def as_markdown(rows: Sequence[Row], columns: Sequence[CompareColumn]) -> str:
    """A table as GitHub shows it, with hardware, versions, data and commands, which readers need to trust it."""
    long = [f"`{c.name}`" if "." in c.name else LONG_HEADINGS.get(c.heading, c.heading) for c in columns]
    table = [(name, "---:" if c.right else "---", c.cells) for name, c in zip(long, columns, strict=True)]
    table += [(name, "---", [_origin(row, name) for row in rows]) for name in ORIGINS]
    if not any(column.name == "run" for column in columns):
        table.append(("runs", "---", [", ".join(member.name for member in row.members) for row in rows]))
    lines = [[heading for heading, _, _ in table], [rule for _, rule, _ in table]]
    lines += [[in_markdown(cells[i]) for _, _, cells in table] for i in range(len(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{NOTE}\n"


def _values(row: Row, name: str) -> list[Any]:
    return [row.data] * bool(row.data) if name == "data" else row.all_of(name)


def _origin(row: Row, name: str) -> str:
    """The values that the runs of a row have; of dates only the days."""
    values = _values(row, name)
    return _joined(dict.fromkeys(value[:10] for value in values) if name == "date" else values) or MISSING


def print_on_terminal(columns: Sequence[CompareColumn]) -> None:
    """Print the columns that fit the terminal, the best row in colour, and the names of the other columns."""
    width, coloured = shutil.get_terminal_size().columns, use_colour(sys.stdout)
    fitted = fit(columns, width, DROPPED)
    headings = [column.heading for column in fitted]
    accuracies = next(column.values for column in columns if column.name == "test_accuracy")
    best = max((value for value in accuracies if value is not None), default=None) if len(accuracies) > 1 else None
    best_style: Style = (headings.index("test %"), "bold green")
    styles = [best_style if value == best is not None else PLAIN for value in accuracies]
    print(*lay_out(fitted, width, [(None, "bold"), *styles] if coloured else ()), sep="\n")
    if left_out := [column.heading for column in columns if column.heading not in headings]:
        note = f"no room for: {', '.join(left_out)}; a wider terminal, a pipe, --markdown, --csv and --json have them"
        print("\n".join(paint(line, "dim") if coloured else line for line in textwrap.wrap(note, width)))


def all_columns(rows: Sequence[Row], *, each: bool) -> list[CompareColumn]:
    """All columns, those in which the rows cannot differ hidden.

    Args:
        each: every row is a single run.
    """
    groups = [row.group for row in rows]
    keys = varied_keys(groups)
    many = len(keys) > MANY_KEYS
    names, states = [_run(row) for row in rows], [_state(row) for row in rows]
    ranks = [sorted(row.all_of("world_sizes")) for row in rows]
    ranks_differ = len({size for sizes in ranks for size in sizes}) > 1
    fewest_epochs = [min(member.epoch for member in row.members) for row in rows]
    setting_texts = [one_line(text) or MISSING for text in settings(groups)]
    return [
        _column("run", names, names, shown=each or not keys),
        *(_key_column(key, heading, rows, shown=not many) for key, heading in short_keys(keys, TAKEN).items()),
        _column("settings", setting_texts, [group.changed or None for group in groups], shown=many),
        _column("seeds", [_seeds(row) for row in rows], [len(row.members) for row in rows], shown=not each),
        _figures("test_accuracy", rows, "{:.2f}".format, deviation=True),
        _figures("best_accuracy", rows, "{:.2f}".format),
        _figures("train_accuracy", rows, "{:.2f}".format),
        _column("epochs", [_epochs(row) for row in rows], fewest_epochs),
        _figures("training_seconds", rows, _hours),
        _figures("wall_seconds", rows, _hours),
        _column("restarts", [_causes(row) for row in rows], [sum(row.causes().values()) for row in rows]),
        _column("ranks", [", ".join(map(str, r)) or MISSING for r in ranks], [r or None for r in ranks], ranks_differ),
        _column("state", states, states, any(row.finished < len(row.members) for row in rows)),
    ]


def _column(name: str, cells: Sequence[str], values: Sequence[Any], shown: bool = True) -> CompareColumn:
    heading = FIGURES[name][0] if name in FIGURES else name
    separator = SEPARATORS.get(name, "")
    return CompareColumn(heading, cells, name not in TEXTS, separator, name=name, values=values, shown=shown)


def _key_column(key: str, heading: str, rows: Sequence[Row], shown: bool) -> CompareColumn:
    changed = [row.group.changed for row in rows]
    values = [values.get(key) for values in changed]
    cells = [(one_line(in_words(values[key])) if key in values else "") or MISSING for values in changed]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None)
    return CompareColumn(heading, cells, numbers, name=key, values=values, shown=shown)


def _figures(name: str, rows: Sequence[Row], form: Callable[[float], str], deviation: bool = False) -> CompareColumn:
    """Means, and with `deviation` their standard deviations where any group has more than one run."""
    figures = [row.figure(name) for row in rows]
    deviations = [MISSING if f is None or f.std is None else f"{f.std:.2f}" for f in figures]
    width = max(map(len, deviations), default=0)
    deviation = deviation and any(text != MISSING for text in deviations)
    ends = [f" ± {text.rjust(width)}" if deviation else "" for text in deviations]
    cells = [MISSING if f is None else form(f.mean) + end for f, end in zip(figures, ends, strict=True)]
    return _column(name, cells, [f and f.mean for f in figures])


def _hours(seconds: float) -> str:
    """`1:02:03`: whole hours and minutes would hide differences between runs."""
    return str(timedelta(seconds=round(seconds)))


def _seeds(row: Row) -> str:
    count = len(row.members)
    return str(count) if row.finished == count else f"{row.finished}/{count}"


def _epochs(row: Row) -> str:
    done = sorted({member.epoch for member in row.members})
    of = max(member.epochs for member in row.members) or MISSING
    return f"{done[0]}/{of}" if len(done) == 1 else f"{done[0]}-{done[-1]}/{of}"


def sort_rows(rows: Sequence[Row], by: str, columns: Sequence[CompareColumn]) -> list[Row]:
    """The rows in the order of a column's values; descending after a leading -. Missing values always come last.

    Raises:
        SpecError: there is no such column; the message lists all.
    """
    known = {column.name: column for column in sorted(columns, key=lambda column: not column.shown)}
    names = {column.heading.removesuffix(" %"): column for column in columns} | known
    word = by.removeprefix("-")
    if word not in names:
        allowed = f"allowed: {', '.join(map(printable, known))}, each with or without a leading -."
        raise SpecError(f"--sort: {shown(by)} is no column; {allowed}{nearest(word, names)}")
    pairs = list(zip(rows, names[word].values, strict=True))
    pairs.sort(key=lambda pair: sort_key(pair[1]), reverse=by.startswith("-"))
    return [row for row, _ in sorted(pairs, key=lambda pair: pair[1] is None)]


def _causes(row: Row) -> str:
    """Restarts of all runs of a row by cause, such as `3 preemption, 1 failure`."""
    if not any(member.epoch or member.restarts for member in row.members):
        return MISSING
    return ", ".join(f"{count} {one_line(cause)}" for cause, count in row.causes().items()) or "0"


def _state(row: Row) -> str:
    """The state of a single run, or the states of the runs that have not finished, counted."""
    if row.group.problem:
        return f"unreadable: {row.members[0].name}"
    if len(row.members) == 1:
        return row.members[0].state
    count = Counter(member.state for member in row.members if not member.finished)
    return ", ".join(f"{n} {state}" for state, n in sorted(count.items())) or "finished"


def _run(row: Row) -> str:
    """The name of the first run, and the number of the others."""
    more = len(row.members) - 1
    return row.members[0].name + (f" and {more} more" if more else "")
