"""Make the screen in README.md and the figure in docs/preemption.md from runs on a real Slurm: python docs/screen.py.

Four runs of jobs/demo.yaml on a minicluster of one node: one finishes, one is preempted twice by a job of higher
priority, one takes its place, one waits. What status knows at that moment goes to docs/screen.json, from which `screen`
makes the lines; a test compares them with README.md. Then the preempted run goes on to its end, and its timeline is
drawn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from cifar_hpc.cli.status import by_urgency, summary, table  # noqa: E402
from cifar_hpc.runs.paths import RunPaths  # noqa: E402
from cifar_hpc.runs.progress import read_progress  # noqa: E402
from cifar_hpc.runs.state import RunState  # noqa: E402

STATES, README, TIMELINE = PROJECT / "docs" / "screen.json", PROJECT / "README.md", PROJECT / "docs" / "timeline.png"
MINICLUSTER = PROJECT / "slurm" / "minicluster" / "minicluster"
COMMAND, WIDTH = "$ python -m cifar_hpc status --watch", 100
# Enough epochs for the preemptions; small enough that two of them fit the machine.
RUNS = {"base": ["train.epochs=6"], "wide": ["model.width_multiplier=0.25", "train.epochs=10"], "deep": [
    "model.blocks=[2, 2, 2]"], "no-flip": ["augment.flip=0"]}  # fmt: skip
PATIENCE_SECONDS = 900


def screen() -> str:
    """The block of README.md, from the recorded states."""
    # Without the times at which Slurm expects to start a job, of which the time from now would be shown.
    states = [RunState(**{**state, "start_time": None}) for state in json.loads(STATES.read_text())]
    lines = [COMMAND, *table(states, WIDTH)[0], summary(states)]
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def replaced(text: str, block: str) -> str:
    """A page with `block` in place of the one that begins with COMMAND."""
    return re.sub(rf"```\n{re.escape(COMMAND)}\n.*?```", lambda _: block, text, flags=re.DOTALL)


class Cluster:
    """A minicluster and the runs on it."""

    def __init__(self, folder: Path) -> None:
        self.slurm, self.root = folder / "slurm", folder / "root"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(self.slurm / "slurm.conf"), "CIFAR_HPC_ROOT": str(self.root)}

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout

    def cifar_hpc(self, *words: str) -> str:
        return self.run(sys.executable, "-m", "cifar_hpc", *words)

    def minicluster(self, command: str, *words: str) -> None:
        self.run(sys.executable, str(MINICLUSTER), command, "--dir", str(self.slurm), *words)

    def submit(self, name: str) -> None:
        words = ["--name", name, "--partition", "gpu", "--set", *RUNS[name]]
        self.run(sys.executable, "submit.py", "jobs/demo.yaml", *words)

    def epoch(self, name: str) -> float:
        return read_progress(RunPaths(self.root, name)).epoch

    def states(self) -> dict[str, RunState]:
        rows = json.loads(self.cifar_hpc("status", "--json"))
        return {row["run"]: RunState(**row) for row in rows}

    def wait(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not there():
            if time.monotonic() > end:
                raise TimeoutError(self.cifar_hpc("status"))
            time.sleep(0.5)

    def preempt(self, name: str) -> None:
        """Have a job of higher priority take the node for some seconds; return when the run waits in the queue."""
        self.run("sbatch", "-p", "urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 20")
        self.wait(lambda: self.states()[name].state == "requeued" and self.run("squeue", "-h", "-p", "urgent") == "")


def record(cluster: Cluster) -> None:
    """Play the scene, and record the states and the timeline."""
    cluster.submit("base")
    cluster.wait(lambda: cluster.epoch("base") > 0)
    for name in ("wide", "deep", "no-flip"):  # each waits for the one before it
        cluster.submit(name)
    cluster.wait(lambda: cluster.epoch("wide") > 2.3)
    cluster.preempt("wide")
    cluster.wait(lambda: cluster.epoch("deep") > 1.6)
    states = by_urgency(list(cluster.states().values()))
    STATES.write_text(json.dumps([dataclasses.asdict(state) for state in states], indent=1) + "\n")
    cluster.wait(lambda: cluster.epoch("wide") > 6.5)
    cluster.preempt("wide")
    cluster.cifar_hpc("requeue", "wide")
    cluster.wait(lambda: cluster.states()["wide"].state == "finished")
    cluster.cifar_hpc("plot", "wide", "--out", str(cluster.root / "figures"))
    shutil.copy(cluster.root / "figures" / "timeline.png", TIMELINE)


def main(words: Sequence[str]) -> None:
    """Record anew; with --lines only make README.md's lines from what was recorded."""
    if list(words) != ["--lines"]:
        with tempfile.TemporaryDirectory(prefix="sc") as folder:  # short, since it holds unix sockets
            cluster = Cluster(Path(folder))
            cluster.minicluster("up", "--nodes", "1", "--cpus", "2", "--gpus", "0", "--no-accounting")
            try:
                record(cluster)
            finally:
                cluster.minicluster("down")
    README.write_text(replaced(README.read_text(), screen()))


if __name__ == "__main__":
    main(sys.argv[1:])
