"""Stubs of sbatch and squeue that know job arrays, for tests of what a submission asks of them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

SBATCH = """#!/bin/sh
echo "$*" >> "$QUEUE.calls"
if [ -e "$QUEUE.refuses" ]; then echo "sbatch: error: Invalid job array specification" >&2; exit 1; fi
id=$(wc -l < "$QUEUE.calls")
name=$(sed -n 's/^#SBATCH --job-name=//p' "$1")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
if [ -n "$last" ]; then
    for index in $(seq 0 "$last"); do echo "${id}_$index|$name|PENDING|Priority|N/A||gpu|(null)|$PWD"; done >> "$QUEUE"
else
    echo "$id|$name|PENDING|Priority|N/A||gpu|(null)|$PWD" >> "$QUEUE"
fi
echo "Submitted batch job $id"
"""
SQUEUE = """#!/bin/sh
case "$*" in *--format*) cat "$QUEUE" 2>/dev/null;; esac
exit 0
"""


def slurm_time(local: str) -> str:
    """A local time as Slurm's commands are asked to print it."""
    return str(int(datetime.fromisoformat(local).timestamp()))


class StubSlurm:
    """Programs in a folder, and the queue that they keep."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.queue = folder / "bin", folder / "queue"
        self.programs.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        self.environment = {"QUEUE": str(self.queue), "PATH": f"{self.programs}:/usr/bin:/bin"}

    def calls(self) -> list[str]:
        """The arguments of each call of sbatch."""
        file = self.queue.with_name("queue.calls")
        return file.read_text().splitlines() if file.exists() else []

    def queued(self) -> list[str]:
        """Ids of the jobs in the queue."""
        return [line.split("|")[0] for line in self.queue.read_text().splitlines()] if self.queue.exists() else []

    def end(self, *ids: str) -> None:
        """Take jobs out of the queue; all, if none is named."""
        lines = self.queue.read_text().splitlines(keepends=True) if self.queue.exists() else []
        self.queue.write_text("".join(line for line in lines if ids and line.split("|")[0] not in ids))

    def refuse(self, refuses: bool) -> None:
        """Whether sbatch refuses every job from now on."""
        file = self.queue.with_name("queue.refuses")
        file.touch() if refuses else file.unlink()
