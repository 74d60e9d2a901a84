"""python -m cifar_hpc status: one line a run."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

from cifar_hpc import slurm
from cifar_hpc.facts_cache import FactsCache
from cifar_hpc.paths import all_runs, find_run, project_root
from cifar_hpc.printable import printable
from cifar_hpc.run_state import RunState, read_state

WATCH_SECONDS = 3.0
COLUMNS = ("RUN", "STATE", "EPOCH", "ACC", "BEST", "IMG/S", "ETA", "RESTARTS", "RANKS", "LOG AGE", "JOB", "DETAIL")


def status(runs: list[str], *, watch: bool, as_json: bool) -> int:
    """Print the state of `runs`, or of all."""
    if watch and not as_json:
        return _watch(runs)
    states = _read(runs)
    if as_json:
        print(json.dumps([s.plain() for s in states], indent=1))
    elif not states:
        print(f"no runs under {project_root() / 'logs'} yet. HINT: python submit.py --help")
    else:
        _print_plain([_cells(s) for s in states])
    return 0


def _read(runs: list[str]) -> list[RunState]:
    root = project_root()
    if runs:
        named = [find_run(root, name) for name in runs]
        jobs = slurm.queue(root)
        return [read_state(paths, jobs) for paths in named]
    cache = FactsCache(root)
    jobs = slurm.queue(root)
    states = [read_state(paths, jobs, cache.facts) for paths in all_runs(root)]
    cache.save()
    return states


def _cells(state: RunState) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    causes = ",".join(f"{count} {cause}" for cause, count in sorted(state.requeues.items()))
    cells = (
        state.run,
        state.state,
        f"{state.epoch}/{state.epochs}",
        percent(state.test_accuracy),
        percent(state.best_accuracy),
        "-" if state.images_per_second is None else f"{state.images_per_second:,.0f}",
        _duration(state.eta_seconds),
        f"{state.restarts}" + (f" ({causes})" if causes else ""),
        str(state.world_size or "-"),
        _duration(state.log_age_seconds),
        state.job_id or "-",
        state.detail,
    )
    return tuple(" ".join(printable(cell).split()) for cell in cells)  # one line, whatever the files hold


def _duration(seconds: float | None) -> str:
    try:
        return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
    except (OverflowError, ValueError):  # more than timedelta can hold; NaN
        return "?"


def _print_plain(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS) - 1)]
    for row in [COLUMNS, *rows]:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def _watch(runs: list[str]) -> int:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table() -> Table:
        result = Table(*(c for c in COLUMNS if c not in ("JOB", "RANKS")), box=None, padding=(0, 1), expand=False)
        for state in _read(runs):
            cells = dict(zip(COLUMNS, _cells(state), strict=True))
            shown = (Text(v) for k, v in cells.items() if k not in ("JOB", "RANKS"))  # not str, which may hold markup
            result.add_row(*shown, style=_STYLES.get(state.state))
        return result

    if not sys.stdout.isatty():
        while True:  # plain blocks for a pipe or a file
            _print_plain([_cells(s) for s in _read(runs)])
            print(flush=True)
            time.sleep(WATCH_SECONDS)
    with Live(table(), console=Console(), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(table(), refresh=True)


_STYLES = {
    "running": "green",
    "failed": "red",
    "hung": "bold red",
    "finished": "dim",
    "queued": "yellow",
    "requeued": "yellow",
    "cancelled": "dim",
    "stopped": "magenta",
    "unreadable": "red",
}
