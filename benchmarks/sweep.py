"""Submitting a sweep of 1,000 points: one call of sbatch, and how long all of it takes.

sbatch and squeue are stubs that answer at once, so that only this project's own work is measured. The second row is the
same sweep submitted again, with half of its points finished.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT, Row, quartiles, rounds, run_part

POINTS = 1000
TARGET_SECONDS = 10.0
JOB = """
data: {source: synthetic}
sweep: {grid: {model.dropout: [0, 0.1, 0.2, 0.3, 0.4]}, seeds: SEEDS, parallel: 50}
"""
# One line for each call; squeue finds an empty queue, as after the jobs have ended.
SBATCH = '#!/bin/sh\necho "$*" >> "$CALLS"\necho "Submitted batch job $(wc -l < "$CALLS")"\n'


def measure(quick: bool) -> list[Row]:
    """Rows of the table."""
    points = 100 if quick else POINTS
    first, again, calls = [], [], []
    for _ in rounds(1 if quick else 5):
        with tempfile.TemporaryDirectory() as folder:
            site = _Site(Path(folder), points)
            first.append(site.submit())
            calls.append(float(site.calls()))
            site.finish_half()
            again.append(site.submit())
            calls.append(float(site.calls() - 1))
    target = f"< {TARGET_SECONDS:g} s"
    return [
        _row(f"submit a sweep of {points:,} points", "s", first, target, quartiles(first)[1] < TARGET_SECONDS),
        _row("submit it again, half of it finished", "s", again, target, quartiles(again)[1] < TARGET_SECONDS),
        _row("calls of sbatch for each", "", calls, "== 1", set(calls) == {1.0}),
    ]


def _row(what: str, unit: str, values: list[float], target: str, met: bool) -> Row:
    return Row("sweep", what, unit, quartiles(values), target=target, met=met)


class _Site:
    """A root for runs, and stubs of Slurm's programs."""

    def __init__(self, folder: Path, points: int) -> None:
        self.root, self.record, self.job = folder / "root", folder / "calls", folder / "sweep.yaml"
        self.job.write_text(JOB.replace("SEEDS", str(points // 5)))
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("sbatch", SBATCH), ("squeue", "#!/bin/sh\n")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
            "PATH": f"{programs}:/usr/bin:/bin",
            "CALLS": str(self.record),
            "CIFAR_HPC_ROOT": str(self.root),
        }

    def submit(self) -> float:
        """Seconds of the whole command, as a user waits for it."""
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "submit.py", str(self.job), "--json"],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - began

    def calls(self) -> int:
        """How often sbatch has been called."""
        return len(self.record.read_text().splitlines())

    def finish_half(self) -> None:
        """As if every other run had trained to its end."""
        from cifar_hpc.runs.events import Finished, append_event
        from cifar_hpc.runs.paths import all_runs

        finished = Finished(step=0, epoch=400, test_accuracy=0.0, best={})
        for run in all_runs(self.root)[::2]:
            append_event(run.events, finished, job_id="1_0", restart=0, world_size=1)


if __name__ == "__main__":
    run_part(measure, __doc__)
