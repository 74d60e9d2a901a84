"""How long the commands of a login node take: help, a dry run, and the status of thousands of runs. Fresh processes.

The runs are those of many_runs.py, in the page cache. Between two calls of `status` every run that is running has
written a line, as it would have. The first call of all finds no progress.json, as with runs of earlier versions, and
makes it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.many_runs import KINDS, append_to_the_running, make_runs
from benchmarks.measure import ROOT, Row, alternate, quartiles, ratios, rounds, run_part

PART = "login"
HELP_SECONDS, DRY_RUN_SECONDS, STATUS_SECONDS = 0.3, 1.0, 2.0
REPETITIONS, STATUS_REPETITIONS = 7, 3
RUNS, QUICK_RUNS = 10_000, 500


def measure(quick: bool) -> list[Row]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_commands(Path(folder)), *_status(Path(folder) / "project", QUICK_RUNS if quick else RUNS, quick)]


def _commands(folder: Path) -> list[Row]:
    seconds = alternate(
        {
            "help": _process("submit.py", "--help", root=folder),
            "dry run": _process("submit.py", "--dry-run", root=folder),
            "submitit": _process("-c", "import submitit", root=folder),
        },
        REPETITIONS,
    )
    help_row = _row("submit.py --help", seconds["help"], HELP_SECONDS)
    dry_run = _row("submit.py --dry-run", seconds["dry run"], DRY_RUN_SECONDS)
    peer = {
        "peer": "python -c 'import submitit'",
        "theirs": quartiles(seconds["submitit"]),
        "ratio": ratios(seconds["dry run"], seconds["submitit"]),
        "note": "ratio: time of the dry run over that of the import, which it contains",
    }
    return [help_row, Row(**(vars(dry_run) | peer))]


def _status(root: Path, runs: int, quick: bool) -> list[Row]:
    commands = make_runs(root, runs)
    call = _process("-m", "cifar_hpc", "status", root=root, path=commands)
    _read_everything(root)  # into the page cache
    first, later = [_seconds(call)], []
    for _ in rounds(1 if quick else STATUS_REPETITIONS):
        append_to_the_running(root, runs)
        later.append(_seconds(call))
    limit = None if quick else STATUS_SECONDS
    moved = runs * KINDS.count("running") // len(KINDS)
    return [
        _row(f"status of {runs:,} runs", later, limit, f"{moved:,} of them have written since the last call"),
        _row(f"status of {runs:,} runs of an earlier version, once", first, None, "the logs of all are read"),
    ]


def _process(*arguments: str, root: Path, path: Path | None = None) -> Callable[[], None]:
    """A Python process of this project with its output thrown away; an error of it is one here."""
    environment = os.environ | {"CIFAR_HPC_ROOT": str(root)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"

    def run() -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)

    return run


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read_everything(root: Path) -> None:
    for path in root.glob("logs/*/*"):
        path.read_bytes()


def _row(what: str, seconds: Sequence[float], limit: float | None, note: str = "") -> Row:
    found = quartiles(seconds)
    target = "" if limit is None else f"< {limit:g} s"
    return Row(PART, what, "s", found, target=target, met=None if limit is None else found[1] < limit, note=note)


if __name__ == "__main__":
    run_part(measure, __doc__)
