"""python -m cifar_hpc compare: a table of runs. Runs that differ only in their seed share a row.

A row for each setting, with only the keys in which the runs differ; runs that
differ in nothing but the seed are one row, mean and standard deviation. --each
gives every run a row of its own. Points of a sweep are in its order.
"""

import argparse
import csv
import io
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from cifar_hpc.cli.status import CAUSES
from cifar_hpc.cli.terminal import PLAIN, Column, Style, fit, lay_out, paint, use_colour
from cifar_hpc.config.io import in_words
from cifar_hpc.errors import SchedulerError, SpecError, nearest
from cifar_hpc.runs import results
from cifar_hpc.runs.paths import find_runs, project_root
from cifar_hpc.runs.queue import ANSWER_SECONDS, jobs_of
from cifar_hpc.runs.results import BASE, MANY_KEYS, Group, Row, base_in_words, sort_key, varied_keys
from cifar_hpc.text import in_latex, in_markdown, one_line, printable, shown

EXAMPLES = (
    "'dropout-*' 'activation-*' --sort=-test_accuracy --markdown",
    "'dropout-*' --columns dropout,seeds,test_accuracy,difference --latex",
)

MISSING = "-"
# Columns by their names, as --sort takes them: those that have the name as their heading, and the figures.
WORDS = ("run", "settings", "seeds", "epochs", "restarts", "ranks", "state")
FIGURES = {  # name: (heading on a terminal, heading in a document)
    "test_accuracy": ("test %", "test accuracy (%)"),
    "difference": ("difference", "difference (± s.e.)"),
    "best_accuracy": ("best %", "best (%)"),
    "train_accuracy": ("train %", "train accuracy (%)"),
    "training_seconds": ("training", "training time"),
    "wall_seconds": ("wall", "wall time"),
    "device_seconds": ("device-h", "device-hours"),
    "lost_seconds": ("lost", "lost to restarts"),
    "peak_memory_bytes": ("mem GiB", "peak memory of a rank (GiB)"),
}
TAKEN = {*WORDS, *FIGURES, *(heading for heading, _ in FIGURES.values())}
LONG_HEADINGS = {"GPU-h": "GPU-hours", **dict(FIGURES.values())}
# How a row was made: below the table of a document, and columns if they are asked for.
ORIGINS = ("hardware", "versions", "data", "date", "command")
# Left out of a narrow table, the first one first.
DROPPED = ("ranks", "lost", "wall", "train %", "device-h", "GPU-h", "best %", "epochs", "restarts", "training")
USUAL = ("seeds", "epochs", "restarts", "ranks", "state")  # below a document's table if all cells are the same
# Columns whose cells may be broken on a narrow terminal, and after what.
SEPARATORS = {"restarts": ", ", "settings": " ", **dict.fromkeys(("runs", *ORIGINS), "; ")}
TEXTS = ("run", "settings", "restarts", "state", "runs", *ORIGINS)  # columns that are aligned at the left
NOTE = (
    "Accuracies are those of the last epoch, as mean ± sample standard deviation over the seeds that have finished "
    "(all, where none has); best is the mean of each run's best epoch. Training time is the sum of a run's epochs, "
    "wall time includes its restarts, device-hours are those of all its ranks, starting and lost work included; all "
    "are means. Of each seed one run counts. Restarts are summed over all runs."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="PATTERN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--sort", metavar="COLUMN", help="a column, ascending; descending: --sort=-COLUMN")
    parser.add_argument("--columns", metavar="A,B,...", help="these columns, in this order; a wrong name lists all")
    parser.add_argument("--each", action="store_true", help="a row for each run, seeds apart")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="machine-readable")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="for a spreadsheet")
    form.add_argument("--markdown", action="store_const", const="markdown", dest="form", help="for a README")
    form.add_argument("--latex", action="store_const", const="latex", dest="form", help="for a paper, with booktabs")


def main(arguments: argparse.Namespace) -> int:
    """Print the results of the runs."""
    if arguments.columns is not None and arguments.form in ("json", "csv"):
        raise SpecError(f"--columns: --{arguments.form} always has all. HINT: leave one of them out.")
    groups = results.group_runs(find_runs(project_root(), arguments.runs), each=arguments.each)
    rows = read_groups(groups)
    if arguments.sort is not None:
        rows = sort_rows(rows, arguments.sort, all_columns(rows, each=arguments.each))
    columns = all_columns(rows, each=arguments.each)
    table = [column for column in columns if column.shown]
    if arguments.columns is not None:
        table = [find_column(columns, word, "--columns") for word in arguments.columns.split(",")]
    elif arguments.form and len(rows) > 1:
        table = [column for column in table if column.name not in USUAL or len({*column.cells}) > 1]
    if arguments.form == "json":
        print(as_json(rows))
    elif arguments.form == "csv":
        print(as_csv(rows), end="")
    elif arguments.form is not None:
        form = as_markdown if arguments.form == "markdown" else as_latex
        print(form(table, list(remarks(rows, columns, table))), end="")
    elif sys.stdout.isatty():
        print_on_terminal(table, base_in_words(groups))
    else:
        print(*lay_out(table), *filter(None, [base_in_words(groups)]), sep="\n")
    for name, seed in ((row.members[0].name, seed) for row in rows for seed in row.ambiguous_seeds):
        text = f"runs of seed {seed} have different results (other hardware?); the first counts, --each shows all"
        print(f"warning: {name}: {text}", file=sys.stderr)
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
    return results.read_rows(groups, jobs)


def as_json(rows: Sequence[Row]) -> str:
    """An object with the list `rows` (docs/formats.md). Keys are only ever added; all are always there."""
    plain = [
        {
            "runs": [member.name for member in row.members],
            "changed": row.group.changed,
            "seeds": row.group.seeds,
            "distinct_seeds": len(set(row.group.seeds)),
            "ambiguous_seeds": row.ambiguous_seeds,
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
        "distinct_seeds": len(set(row.group.seeds)),
        "finished": row.finished,
        "state": one_line(_state(row)),
        "epochs_done": _joined(dict.fromkeys(member.epoch for member in row.members)),
        "epochs": _joined(row.all_of("epochs")),
        **{f"{name}_{part}": f and getattr(f, part) for name, f in figures.items() for part in ("mean", "std")},
        "restarts": sum(causes.values()),
        "restart_causes": _joined(f"{count} {one_line(cause)}" for cause, count in causes.items()),
        **{
            name: _joined(map(_csv_value, _values(row, name))) for name in ("device", "world_sizes", "shards", *ORIGINS)
        },
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


Remark = tuple[str, list[tuple[str, str]]]  # (subject, [(labels of rows, text)]), with no label if it is of all rows


def remarks(rows: Sequence[Row], columns: Sequence[CompareColumn], table: Sequence[CompareColumn]) -> Iterator[Remark]:
    """Lines below a document's `table`, which has some of the columns."""
    by_name = {column.name: column for column in columns}
    usual = [c for name in USUAL if (c := by_name[name]).shown and c not in table and len({*c.cells}) == 1]
    if usual and len(rows) > 1:
        yield "in each row", [("", ", ".join(f"{c.heading} {c.cells[0]}" for c in usual))]
    if text := base_in_words([row.group for row in rows]):
        yield BASE, [("", text.partition(": ")[2])]
    names = results.labels([row.group for row in rows])
    for name in (*ORIGINS, "runs"):
        labelled: dict[str, list[str]] = {}
        for label, text in zip(names, by_name[name].cells, strict=True):
            labelled.setdefault(text, []).append(label)
        if by_name[name] not in table and (name != "runs" or len(rows) > 1):
            yield name, [("", t) if len(labelled) == 1 else ("; ".join(of), t) for t, of in labelled.items()]


def as_markdown(columns: Sequence[CompareColumn], below: Sequence[Remark]) -> str:
    """A table as GitHub shows it, and below it what readers need to trust it."""
    lines = [[_code(c.name) if "." in c.name else LONG_HEADINGS.get(c.heading, c.heading) for c in columns]]
    lines += [["---:" if c.right else "---" for c in columns]]
    lines += [[in_markdown(cell) for cell in cells] for cells in zip(*(c.cells for c in columns), strict=True)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    for subject, parts in below:
        form = _code if subject in (BASE, "command", "runs") else in_markdown
        text += f"- {subject}:" + (f" {form(parts[0][1])}\n" if len(parts) == 1 else "\n")
        text += "".join(f"  - {in_markdown(label)}: {form(part)}\n" for label, part in parts if len(parts) > 1)
    return f"{text}\n{NOTE}\n"


def _code(text: str) -> str:
    return in_markdown(text) if "`" in text else f"`{one_line(text)}`"


def as_latex(columns: Sequence[CompareColumn], below: Sequence[Remark]) -> str:
    r"""A tabular of booktabs, and as comments what its caption may say."""
    lines = [[LONG_HEADINGS.get(column.heading, column.heading) for column in columns]]
    lines += [list(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    head, *body = [" & ".join(in_latex(cell) for cell in line) + r" \\" for line in lines]
    sides = "".join("r" if column.right else "l" for column in columns)
    table = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    comments = [f"{subject}: {': '.join(filter(None, part))}" for subject, parts in below for part in parts]
    return "\n".join([*table, *(f"% {one_line(comment)}" for comment in [*comments, NOTE])]) + "\n"


def _values(row: Row, name: str) -> list[Any]:
    own = {"data": [row.data] * bool(row.data), "runs": [member.name for member in row.members]}
    return own[name] if name in own else row.all_of(name)


def _origin_of(row: Row, name: str) -> str:
    """The values that the runs of a row have; of dates only the days."""
    values = _values(row, name)
    return _joined(dict.fromkeys(value[:10] for value in values) if name == "date" else values) or MISSING


def print_on_terminal(columns: Sequence[CompareColumn], base: str = "") -> None:
    """Print the columns that fit the terminal, the best row in colour, the names of the other columns, and the base."""
    width, coloured = shutil.get_terminal_size().columns, use_colour(sys.stdout)
    fitted = fit(columns, width, DROPPED)
    headings = [column.heading for column in fitted]
    accuracies = next((column.values for column in columns if column.name == "test_accuracy"), columns[0].values)
    styles = [PLAIN] * len(accuracies)
    if "test %" in headings and len(accuracies) > 1:
        best = max((value for value in accuracies if value is not None), default=None)
        best_style: Style = (headings.index("test %"), "bold green")
        styles = [best_style if value == best is not None else PLAIN for value in accuracies]
    print(*lay_out(fitted, width, [(None, "bold"), *styles] if coloured else ()), sep="\n")
    notes = [base]
    if left_out := [column.heading for column in columns if column.heading not in headings]:
        others = "--columns chooses; a wider terminal, a pipe, --markdown, --csv and --json have them"
        notes.append(f"no room for: {', '.join(left_out)}; {others}")
    for line in (line for note in notes for line in textwrap.wrap(note, width, break_on_hyphens=False)):
        print(paint(line, "dim") if coloured else line)


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
    setting_texts = [one_line(text) or MISSING for text in results.settings(groups)]
    return [
        _column("run", names, names, shown=each or not keys),
        *(_key_column(key, heading, rows, shown=not many) for key, heading in results.short_keys(keys, TAKEN).items()),
        _column("settings", setting_texts, [group.changed or None for group in groups], shown=many),
        _column("seeds", [_seeds(row) for row in rows], [len(set(row.group.seeds)) for row in rows], shown=not each),
        _figures("test_accuracy", rows, "{:.2f}".format),
        _figures("difference", rows, lambda points: f"{round(points, 2) + 0.0:+.2f}", shown=False),  # never -0.00
        _figures("best_accuracy", rows, "{:.2f}".format),
        _figures("train_accuracy", rows, "{:.2f}".format),
        _column("epochs", [_epochs(row) for row in rows], fewest_epochs),
        _figures("training_seconds", rows, _hours),
        _figures("wall_seconds", rows, _hours),
        _device_hours(rows),
        _figures("lost_seconds", rows, _hours, shown=any(row.causes() for row in rows)),
        _figures("peak_memory_bytes", rows, lambda size: f"{size / 2**30:.2f}", shown=False),
        _column("restarts", [_causes(row) for row in rows], [sum(row.causes().values()) for row in rows]),
        _column("ranks", [", ".join(map(str, r)) or MISSING for r in ranks], [r or None for r in ranks], ranks_differ),
        _column("state", states, states, any(row.finished < len(row.members) for row in rows)),
        *(_column(name, cells := [_origin_of(r, name) for r in rows], cells, False) for name in ("runs", *ORIGINS)),
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


def _figures(name: str, rows: Sequence[Row], form: Callable[[float], str], shown: bool = True) -> CompareColumn:
    """Means, and where there are several seeds the spread of the test accuracy and of differences."""
    figures = [row.figure(name) for row in rows]
    spread = {"test_accuracy": "std", "difference": "error"}.get(name)
    deviations = ["" if f is None or f.std is None or not spread else f"{getattr(f, spread):.2f}" for f in figures]
    width = max(map(len, deviations), default=0)
    ends = [f" ± {text:>{width}}" if text else " " * (width and width + len(" ± ")) for text in deviations]
    cells = [MISSING if f is None else form(f.mean) + end for f, end in zip(figures, ends, strict=True)]
    return _column(name, cells, [f and f.mean for f in figures], shown)


def _device_hours(rows: Sequence[Row]) -> CompareColumn:
    column = _figures("device_seconds", rows, lambda seconds: f"{seconds / 3600:.3f}")
    devices = {device for row in rows for device in row.all_of("device")}
    return replace(column, heading="GPU-h") if devices == {"gpu"} else column


def _hours(seconds: float) -> str:
    """`1:02:03`: whole hours and minutes would hide differences between runs."""
    return str(timedelta(seconds=round(seconds)))


def _seeds(row: Row) -> str:
    """Distinct seeds, those that have finished before a slash, and the runs where a seed has several."""
    count, runs = len(set(row.group.seeds)), len(row.members)
    done = len(row.counted) if row.finished else 0
    return (str(count) if done == count else f"{done}/{count}") + (f" ({runs} runs)" if runs > count > 0 else "")


def _epochs(row: Row) -> str:
    done = sorted({member.epoch for member in row.members})
    of = max(member.epochs for member in row.members) or MISSING
    return f"{done[0]}/{of}" if len(done) == 1 else f"{done[0]}-{done[-1]}/{of}"


def find_column(columns: Sequence[CompareColumn], word: str, option: str, more: str = "") -> CompareColumn:
    """The column of that name or heading.

    Raises:
        SpecError: there is no such column; the message lists all.
    """
    known = {column.name: column for column in sorted(columns, key=lambda column: not column.shown)}
    names = {column.heading.removesuffix(" %"): column for column in columns} | known
    if word not in names:
        allowed = f"allowed: {', '.join(map(printable, known))}{more}."
        raise SpecError(f"{option}: {shown(word)} is no column; {allowed}{nearest(word.removeprefix('-'), names)}")
    return names[word]


def sort_rows(rows: Sequence[Row], by: str, columns: Sequence[CompareColumn]) -> list[Row]:
    """The rows in the order of a column's values; descending after a leading -. Missing values always come last.

    Raises:
        SpecError: as `find_column`.
    """
    column = find_column(columns, by.removeprefix("-"), "--sort", ", each with or without a leading -")
    pairs = list(zip(rows, column.values, strict=True))
    pairs.sort(key=lambda pair: sort_key(pair[1]), reverse=by.startswith("-"))
    return [row for row, _ in sorted(pairs, key=lambda pair: pair[1] is None)]


def _causes(row: Row) -> str:
    """Restarts of all runs of a row by cause, such as `3 preemption, 1 failure`."""
    if not any(member.epoch or member.restarts for member in row.members):
        return MISSING
    return ", ".join(f"{count} {CAUSES.get(cause, one_line(cause))}" for cause, count in row.causes().items()) or "0"


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
    return row.members[0].name + (f" and {more} more" if (more := len(row.members) - 1) else "")
