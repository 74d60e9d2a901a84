"""python -m cifar_hpc du: disk use of runs.

Biggest first. A file with several names (hard links) is counted once. Without
names: all runs, the sweeps' shared folders, and what a killed rm has left.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cifar_hpc.cli.parser import note
from cifar_hpc.cli.terminal import Column, lay_out
from cifar_hpc.runs.paths import SWEEPS, RunPaths, find_runs, is_run_name, project_root
from cifar_hpc.runs.queue import THREADS

EXAMPLES = ("", "'dropout-*' --json")
REMOVED = ".removed"  # end of the hidden name of a folder that rm deletes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="names or patterns such as 'dropout-*'; default: all")
    parser.add_argument("--json", action="store_true", help="machine-readable")


@dataclass(frozen=True)
class Use:
    """Bytes on disk: of checkpoints, of the code snapshots, and of all else in the folder of logs."""

    name: str
    checkpoints: int
    code: int
    logs: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.checkpoints + self.code + self.logs


def main(arguments: argparse.Namespace) -> int:
    """Print what each run takes, the biggest first, and the sum.

    Raises:
        SpecError: no run matches a pattern.
    """
    root = project_root()
    names = everything(root)
    names = [run.name for run in find_runs(root, arguments.runs, names)] if arguments.runs else names
    uses = disk_use(root, names)
    total = sum(use.total for use in uses)
    if arguments.json:
        rows = [asdict(use) | {"total": use.total} for use in uses]
        print(json.dumps({"runs": rows, "total": total}, indent=1))
        return 0
    columns = [Column("run", [*(use.name for use in uses), f"all {len(uses)}"])]
    for part in ("total", "checkpoints", "code", "logs"):
        counts = [getattr(use, part) for use in uses]
        columns.append(Column(part, [size(count) for count in (*counts, sum(counts))], right=True))
    print(*lay_out(columns), sep="\n")
    return 0


def everything(root: Path) -> list[str]:
    """Names of all folders of runs, of sweeps, and of runs that were not deleted to the end."""
    found = {path.name for kind in ("logs", "checkpoints") for path in (root / kind).glob("*") if path.is_dir()}
    sweeps = {f"{SWEEPS}/{path.name}" for path in (root / "logs" / SWEEPS).glob("*")}
    return sorted({name for name in found if is_run_name(name) or name.endswith(REMOVED)} | sweeps)


def disk_use(root: Path, names: Sequence[str]) -> list[Use]:
    """Disk use of folders below logs/ and checkpoints/, the biggest first."""
    with ThreadPoolExecutor(THREADS) as pool:  # on shared file systems most of the time passes in waiting
        found = list(pool.map(lambda name: _scan(RunPaths(root, name)), names))
    if unreadable := [str(path) for *_, denied in found for path in denied]:
        note(f"{len(unreadable)} folders cannot be read and are not counted, such as {unreadable[0]}")
    seen: set[tuple[int, int]] = set()
    uses = [
        Use(name, *(_count(files, seen) for files in parts)) for name, (*parts, _) in zip(names, found, strict=True)
    ]
    return sorted(uses, key=lambda use: -use.total)


Files = list[tuple[int, int, int]]  # device, inode, bytes


def _scan(run: RunPaths) -> tuple[Files, Files, Files, list[Path]]:
    """Files of (checkpoints, code, the other logs), and folders that cannot be read."""
    denied: list[Path] = []
    parts: tuple[Files, Files, Files] = [], [], []
    # A folder, and the place in `parts` of what is in there. Folders of runs may be links.
    waiting = [(run.checkpoints.resolve(), 0), (run.logs.resolve(), 2)]
    while waiting:
        folder, part = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            denied.append(folder)
            continue
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:  # deleted meanwhile
                continue
            inside = 1 if part == 2 and entry.name == "code" else part
            parts[inside].append((status.st_dev, status.st_ino, status.st_blocks * 512))
            if entry.is_dir(follow_symlinks=False):
                waiting.append((folder / entry.name, inside))
    return *parts, denied


def _count(files: Iterable[tuple[int, int, int]], seen: set[tuple[int, int]]) -> int:
    total = 0
    for device, inode, taken in files:
        total += taken if (device, inode) not in seen else 0
        seen.add((device, inode))
    return total


def size(count: float) -> str:
    """`12 B`, `3.4 MiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007 - the last one stays
        count /= 1024
        if count < 1024:
            break
    return f"{count:.1f} {unit}"
