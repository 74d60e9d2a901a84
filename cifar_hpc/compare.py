"""python -m cifar_hpc compare: a table of runs, those that differ in their seed alone in one row."""

from __future__ import annotations

import sys

from cifar_hpc import compare_forms, slurm
from cifar_hpc.compare_rows import read_rows
from cifar_hpc.compare_table import columns, sort_rows
from cifar_hpc.errors import SchedulerError
from cifar_hpc.paths import find_runs, project_root
from cifar_hpc.printable import printable
from cifar_hpc.run_groups import group_runs

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
        jobs = slurm.queue(root, QUEUE_TIMEOUT_SECONDS)
    except SchedulerError as error:
        jobs = None
        print(f"warning: what unfinished runs are doing is not known: {printable(str(error))}", file=sys.stderr)
    rows = read_rows(groups, jobs)
    if sort is not None:
        rows = sort_rows(rows, sort, columns(rows, each=each))
    if form == "json":
        print(compare_forms.as_json(rows))
    elif form == "csv":
        print(compare_forms.as_csv(rows), end="")
    elif form == "markdown":
        print(compare_forms.as_markdown(rows, each=each), end="")
    elif sys.stdout.isatty():
        compare_forms.show_on_terminal(rows, each=each)
    else:
        print(compare_forms.as_plain(rows, each=each), end="")
    for group in groups:
        if group.problem:
            print(f"warning: {group.runs[0].name}: {printable(group.problem)}", file=sys.stderr)
    return 0
