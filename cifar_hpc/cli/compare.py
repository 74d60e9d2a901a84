"""python -m cifar_hpc compare: a table of runs, those that differ in their seed alone in one row."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cifar_hpc.cli.compare_columns import MISSING, Column, columns, one_line, sort_rows, state_in_words
from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.groups import group_runs, varied_keys
from cifar_hpc.runs.paths import find_runs, project_root
from cifar_hpc.runs.results import Figure, Row, read_rows
from cifar_hpc.text import printable

FIGURES = ("test_accuracy", "best_accuracy", "train_accuracy", "training_seconds", "wall_seconds")
# In a document beside the columns of the table: what tells a reader how a row was made.
ORIGINS = ("hardware", "versions", "data", "date", "command")
# What a narrow terminal has room for beside the rest, the most important first.
OPTIONAL = ("training_seconds", "restarts", "epochs", "best_accuracy", "train_accuracy", "wall_seconds", "ranks")
NOTE = (
    "Accuracies are those of the last epoch, as mean ± sample standard deviation over the seeds that have finished "
    "(all, where none has); best is the mean of each run's best epoch. Training time is the sum of a run's epochs, "
    "wall time includes its restarts; both are means. Restarts are summed over the seeds."
)
GAP = "  "
# Columns whose cells a terminal may break, and where.
WRAPPING = {"restarts": ", ", "settings": " "}


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
    return json.dumps({"rows": [_plain(row) for row in rows]}, indent=1, allow_nan=False)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "runs": [member.name for member in row.members],
        "changed": row.group.changed,
        "seeds": list(row.group.seeds),
        "finished": row.finished,
        "counted": [member.name for member in row.counted],
        **{name: asdict(figure) if (figure := row.figure(name)) else None for name in FIGURES},
        "restarts": row.causes(),
        "data": row.data or None,
        "problem": row.group.problem or None,
        "members": [asdict(member) for member in row.members],
    }


def as_csv(rows: Sequence[Row]) -> str:
    """RFC 4180: a header and a line a row, numbers unrounded; what is missing is an empty field, as spreadsheets want.

    Lists (runs, seeds, hardware, ...) are one field, separated by '; '.
    """
    keys = varied_keys([row.group for row in rows])
    header = ["runs", *keys, "seeds", "finished", "state", "epochs_done", "epochs"]
    header += [f"{name}_{part}" for name in FIGURES for part in ("mean", "std")]
    header += ["restarts", "restart_causes", "world_sizes", "shards", *ORIGINS]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    for row in rows:
        figures = [row.figure(name) or Figure("", None, 0) for name in FIGURES]  # type: ignore[arg-type]
        causes = row.causes()
        writer.writerow(
            [
                _joined(member.name for member in row.members),
                *(_csv_value(row.group.changed.get(key)) for key in keys),
                _joined(row.group.seeds),
                row.finished,
                one_line(state_in_words(row)),
                _joined(dict.fromkeys(member.epoch for member in row.members)),
                _joined(row.all_of("epochs")),
                *(value for figure in figures for value in (figure.mean, figure.std)),
                sum(causes.values()),
                _joined(f"{count} {one_line(cause)}" for cause, count in causes.items()),
                *(_joined(map(_csv_value, _values(row, name))) for name in ("world_sizes", "shards", *ORIGINS)),
            ]
        )
    return text.getvalue()


def _joined(values: Any) -> str:
    return "; ".join(map(str, values))


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value)
    return one_line(value) if isinstance(value, str) else value


def as_markdown(rows: Sequence[Row], *, each: bool) -> str:
    """A table as GitHub shows it, with what a reader has to know to trust it: hardware, versions, data, command."""
    chosen = columns(rows, each=each)
    cells = [(column.long, "---:" if column.right else "---", column.cells(rows)) for column in chosen]
    cells += [(name, "---", [_origin(row, name) for row in rows]) for name in ORIGINS]
    if not any(column.name == "run" for column in chosen):
        cells.append(("runs", "---", [", ".join(member.name for member in row.members) for row in rows]))
    lines = [[heading for heading, _, _ in cells], [rule for _, rule, _ in cells]]
    lines += [[_in_markdown(column[i]) for _, _, column in cells] for i in range(len(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{NOTE}\n"


def _values(row: Row, name: str) -> list[Any]:
    return [row.data] * bool(row.data) if name == "data" else row.all_of(name)


def _origin(row: Row, name: str) -> str:
    """What all members of a row have of one kind; of the dates the days alone."""
    values = _values(row, name)
    return _joined(dict.fromkeys(value[:10] for value in values) if name == "date" else values) or MISSING


def _in_markdown(text: str) -> str:
    for special in "\\`|*_<>[]":
        text = text.replace(special, f"\\{special}")
    return one_line(text)


def as_plain(rows: Sequence[Row], *, each: bool) -> str:
    """Aligned columns in full, for a pipe or a file."""
    lines = []
    chosen = columns(rows, each=each)
    table = [_padded(column, [column.heading, *column.cells(rows)]) for column in chosen]
    for line in zip(*table, strict=True):
        lines.append(GAP.join(line).rstrip() + "\n")
    return "".join(lines)


def _padded(column: Column, texts: Sequence[str]) -> list[str]:
    width = max(map(len, texts))
    return [text.rjust(width) if column.right else text.ljust(width) for text in texts]


def show_on_terminal(rows: Sequence[Row], *, each: bool) -> None:
    """A table that fits the terminal: what is less important is left out, and said to be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    chosen, left_out = fitting(columns(rows, each=each), rows, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
    for column in chosen:
        table.add_column(
            Text(column.heading), justify="right" if column.right else "left", no_wrap=column.name not in WRAPPING
        )
    best = max((figure.mean for row in rows if (figure := row.figure("test_accuracy"))), default=None)
    texts = [column.cells(rows) for column in chosen]
    for index, row in enumerate(rows):
        figure = row.figure("test_accuracy")
        leads = len(rows) > 1 and figure is not None and figure.mean == best
        styles = ("bold green" if leads and column.name == "test_accuracy" else "" for column in chosen)
        table.add_row(*(Text(text[index], style) for text, style in zip(texts, styles, strict=True)))
    console.print(table)
    if left_out:
        console.print(
            f"left out for want of room: {', '.join(column.heading for column in left_out)}; a wider terminal, a pipe, "
            "--markdown, --csv and --json have all",
            style="dim",
        )


def fitting(chosen: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], list[Column]]:
    """(columns that a terminal `width` characters wide has room for, those that it has not), in their order."""
    names = {column.name for column in chosen} - set(OPTIONAL)
    for name in OPTIONAL:
        if _width([column for column in chosen if column.name in {*names, name}], rows) <= width:
            names.add(name)
    return [c for c in chosen if c.name in names], [c for c in chosen if c.name not in names]


def _width(chosen: Sequence[Column], rows: Sequence[Row]) -> int:
    """What they need side by side; the pieces of some cells may stand below one another."""
    needed = 0
    for column in chosen:
        texts = [column.heading, *column.cells(rows)]
        between = WRAPPING.get(column.name)
        pieces = [piece for text in texts for piece in (text.split(between) if between else [text])]
        needed += max(len(piece) + bool(between) for piece in pieces) + len(GAP)
    return needed


QUEUE_TIMEOUT_SECONDS = 10.0


def compare(runs: list[str], sort: str | None, form: str | None, *, each: bool) -> int:
    """Print what `runs` (names or patterns) came to.

    Args:
        sort: a column, with a leading - for the other direction; None: by the changed values.
        form: json, csv, markdown; None: a table.
        each: a row for each run instead of one for all seeds.

    Raises:
        SpecError: a pattern that no run matches, or an unknown column.
    """
    root = project_root()
    groups = group_runs(find_runs(root, runs), each=each)
    try:
        jobs = run_queue.queue(root, QUEUE_TIMEOUT_SECONDS)
    except SchedulerError as error:
        jobs = None
        print(f"warning: what unfinished runs are doing is not known: {printable(str(error))}", file=sys.stderr)
    rows = read_rows(groups, jobs)
    if sort is not None:
        rows = sort_rows(rows, sort, columns(rows, each=each))
    if form == "json":
        print(as_json(rows))
    elif form == "csv":
        print(as_csv(rows), end="")
    elif form == "markdown":
        print(as_markdown(rows, each=each), end="")
    elif sys.stdout.isatty():
        show_on_terminal(rows, each=each)
    else:
        print(as_plain(rows, each=each), end="")
    for group in groups:
        if group.problem:
            print(f"warning: {group.runs[0].name}: {printable(group.problem)}", file=sys.stderr)
    return 0
