"""Every part of the benchmarks, one after the other: one table and one JSON file.

    python -m benchmarks.suite [--quick] [--only step,login] [--out FILE]

Each part runs in a process of its own. One that fails is a row of the table, and the others still run; the exit status
is then 1. A target that is missed is no failure: it stands in the table.

--quick takes QUICK_SECONDS at most, on any machine: each part has its share of what is left, begins no further round
after a part of that, and is ended when it is over. A part that was not done by then is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, Row, environment, table

PARTS = ("step", "augmentation", "checkpoint", "preemption", "startup", "overhead", "login", "sweep", "scaling")
# The parts of --quick with their shares of its time; another one that --only names has OTHER_SHARE.
QUICK_PARTS = {"step": 60, "augmentation": 24, "checkpoint": 34, "startup": 30, "login": 14, "sweep": 8}
OTHER_SHARE = 30
LIMIT_SECONDS = 600
QUICK_SECONDS = 170  # all of it, so that `make bench QUICK=1` stays below three minutes
ROUNDS = 0.6  # of a part's time, after which no further round begins
PATIENCE_SECONDS = 30  # for a part that is interrupted to stop what it started


def time_of(part: str, later: Sequence[str], left: float) -> float:
    """Seconds of --quick for a part, if so many are left for it and the later ones."""
    share, *others = (QUICK_PARTS.get(name, OTHER_SHARE) for name in (part, *later))
    return left * share / (share + sum(others))


def run_part(part: str, quick: bool, limit: float = LIMIT_SECONDS) -> list[Row]:
    """The rows of a part, or a row that says why there are none, within `limit` seconds.

    Its own table goes to standard error.
    """
    patience = min(PATIENCE_SECONDS, limit / 10)
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder, "rows.json"), Path(folder, "errors.txt")
        command = [sys.executable, "-m", f"benchmarks.{part}", "--json", str(rows), *(["--quick"] if quick else [])]
        command += ["--seconds", str(ROUNDS * limit)]
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=2, stderr=stderr, process_group=0
            )
            try:
                status = process.wait(limit - patience)
            except subprocess.TimeoutExpired:
                why = f"not done in {limit - patience:.0f} s"
                return [Row(part, f"not measured: {why}", "", ())] if quick else [_failed(part, why)]
            finally:
                _end(process, patience)
        sys.stderr.write(errors.read_text())
        if status != 0:
            lines = errors.read_text().strip().splitlines()
            return [_failed(part, lines[-1].strip() if lines else f"exit status {status}")]
        return [Row(**row) for row in json.loads(rows.read_text())]


def _failed(part: str, why: str) -> Row:
    return Row(part, f"failed: {why}", "", (), met=False)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Interrupt a part that still runs, then end whatever of its process group is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed(rows: Sequence[Row]) -> list[str]:
    """The parts of which a row says that they failed."""
    return [row.part for row in rows if row.what.startswith("failed: ")]


def machine(where: Mapping[str, Any]) -> str:
    """A short name of the hardware, such as "intel-xeon-2-cores"; never a host's name."""
    name = re.sub(r"\([^)]*\)|@.*|\b(cpu|processor)\b", " ", str(where["gpu"] or where["cpu"]), flags=re.IGNORECASE)
    words = [*re.findall(r"[a-z0-9]+", name.lower())[:5], f"{where['cores']}-cores"]
    return "-".join(words)


def default_path(where: Mapping[str, Any], quick: bool, only: Sequence[str]) -> Path:
    """Where the results go: a quick or partial measurement never replaces a full one."""
    words = [f"{datetime.now(UTC):%Y-%m-%d}", machine(where), *(["quick"] if quick else []), *only]
    return RESULTS / f"{'-'.join(words)}.json"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"fewer and smaller parts: {QUICK_SECONDS} s at most")
    parser.add_argument("--only", default="", metavar="PART,PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: benchmarks/results/<date>-<machine>")
    options = parser.parse_args(argv)
    only = [part for part in options.only.split(",") if part]
    unknown = [part for part in only if part not in PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: allowed: {', '.join(PARTS)}")
    end = time.monotonic() + QUICK_SECONDS
    where = environment()
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    parts = only or list(QUICK_PARTS if options.quick else PARTS)
    for number, part in enumerate(parts, 1):
        print(f"{part} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        limit = time_of(part, parts[number:], end - began) if options.quick else LIMIT_SECONDS
        rows += run_part(part, options.quick, limit)
        seconds[part] = round(time.monotonic() - began, 1)
    print(table(rows))
    print(f"\n{sum(seconds.values()):.0f} s: " + ", ".join(f"{part} {s:.0f}" for part, s in seconds.items()))
    path = options.out or default_path(where, options.quick, only)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": where, "quick": options.quick, "rows": [asdict(row) for row in rows], "seconds": seconds}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    return 1 if failed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
