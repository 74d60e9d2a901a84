"""Runs under the real Slurm that $SLURM_CONF names, disturbed by what only a cluster does.

Every run is submitted through submit.py, as its users do it, and is submitted again with another number of tasks
whenever its job is gone for good. The faults strike when the run has done a drawn amount of work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.chaos import story, verdict
from tests.chaos.plan import RunPlan, deal
from tests.chaos.play import Played, Stage
from tests.chaos.ranks import PROJECT, clean_environment
from tests.chaos.show import Struck

PATIENCE_SECONDS = 400.0  # only bounds a hang
KINDS = (
    "scancel --signal=TERM", "scancel --signal=USR1", "scancel --signal=USR2", "cancel", "requeue", "scontrol requeue",
    "kill a task", "kill all tasks", "urgent job", "node down",
)  # fmt: skip
# Checkpoints that a start has written when it is struck; 0 is while it comes up.
MOMENTS = (0, 0, 1, 2, 3)
STARTING_SECONDS = 6.0  # about what a start takes until its first step: for a random moment of it
HOLDING = ("RUNNING", "COMPLETING", "SIGNALING", "STOPPED", "CONFIGURING")


class GaveUpError(Exception):
    """Something did not happen for much too long."""


class Cluster:
    """The project that is submitted from, and Slurm's programs."""

    def __init__(self, stage: Stage) -> None:
        if "SLURM_CONF" not in os.environ:
            sys.exit(
                "error: SLURM_CONF is not set: --backend slurm needs a cluster to play on. "
                'HINT: slurm/minicluster/minicluster up; eval "$(slurm/minicluster/minicluster env)"'
            )
        self.stage = stage
        self.project = stage.folder / "project"
        for name in ("cifar_hpc", "slurm", "jobs"):
            shutil.copytree(PROJECT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PROJECT / "submit.py", self.project)
        self.nodes = sorted(set(self.run("sinfo", "--noheader", "--Node", "--format=%N").split()))

    def run(self, *command: str, root: Path | None = None, check: bool = True) -> str:
        """What a program prints."""
        environment = clean_environment() | {"SLURM_CONF": os.environ["SLURM_CONF"]}
        environment |= {"CIFAR_HPC_ROOT": str(root), "PYTHONPATH": ""} if root else {}
        done = subprocess.run(
            command, env=environment, cwd=self.project, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise GaveUpError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job`; empty for one that is forgotten."""
        words = self.run("scontrol", "show", "job", "-o", job_id, check=False).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def tasks(self, variable: str) -> list[int]:
        """Process ids of the tasks on this cluster whose environment has `variable`, such as `SLURM_JOB_ID=7`."""
        found = []
        wanted = {f"{word}\0".encode() for word in (variable, f"SLURM_CONF={os.environ['SLURM_CONF']}")}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and b"submitit.core._submit" in (entry / "cmdline").read_bytes().split(b"\0"):
                    environment = (entry / "environ").read_bytes()
                    if b"SLURM_PROCID=" in environment and all(word in environment for word in wanted):
                        found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile
        return sorted(found)

    def mend_nodes(self) -> None:
        """Put nodes back into service that Slurm has taken out, as an operator would."""
        for line in set(self.run("sinfo", "--noheader", "--Node", "--format=%N %T %E").splitlines()):
            node, state, reason = line.split(maxsplit=2)
            if state.startswith("drain") and reason != "chaos":
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def play(self, what: RunPlan, faults: int, worlds: Sequence[int], seed: int) -> Played:
        """Play a run to its end."""
        if what.spec == "fp16":  # its initial scale is set in a fork only
            what = replace(what, spec="fp32")
        reference, _ = self.stage.reference(what.spec)
        root = self.stage.root(f"run-{what.number}", what)
        played = Played(what, root)
        run = ClusterRun(self, root, f"chaos-{os.getpid()}-{what.number}", played)
        rng = random.Random(f"{seed}/cluster {what.number}")
        kinds = deal(f"{seed}/cluster kinds", KINDS)
        kinds_of_this = [kind for _, kind in zip(range((what.number + 1) * faults), kinds, strict=False)][-faults:]
        try:
            run.play(kinds_of_this, worlds, rng)
        except GaveUpError as error:
            played.problems.append(str(error))
        finally:
            self.run("scancel", f"--name={run.name}", check=False)
        if not played.problems:
            facts = self.stage.facts(root, run.name)
            played.problems += verdict.compare(facts, reference)
            played.problems += verdict.check_files(root, run.name, what.checkpoint["keep"], reference["final"]["rows"])
            played.problems += check_story(run.events())
        if not played.problems:
            shutil.rmtree(root)
        return played


class ClusterRun:
    """One run on the cluster."""

    def __init__(self, cluster: Cluster, root: Path, name: str, played: Played) -> None:
        self.cluster, self.root, self.name, self.played = cluster, root, name, played
        self.job_id = ""

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The rows of events.jsonl, those of some kinds or all."""
        path = self.root / "logs" / self.name / "events.jsonl"
        rows, _ = story.split_lines(path.read_text() if path.exists() else "")
        return [row for row in rows if not kinds or row["event"] in kinds]

    def play(self, kinds: list[str], worlds: Sequence[int], rng: random.Random) -> None:
        """Strike with `kinds`, one after the other, and see the run to its end."""
        while not self.events("finished"):
            self._see_to_it(rng.choice(worlds))
            if not kinds:
                self._until("finished, or its job gone", lambda: self.events("finished") or not self._holding())
                continue
            kind, moment, share, all_nodes = kinds.pop(0), rng.choice(MOMENTS), rng.random(), rng.random()
            place = f"after {moment} checkpoints" if moment else "coming up"
            struck = Struck(kind, place, 0, "not reached")
            self.played.struck.append(struck)
            began = len(self.events("checkpoint"))
            self._until(
                f"{moment} checkpoints",
                lambda began=began, moment=moment: (
                    self.events("finished") or not self._holding() or len(self.events("checkpoint")) >= began + moment
                ),
            )
            time.sleep(share * (STARTING_SECONDS if moment == 0 else 0.2))
            job = self.cluster.job(self.job_id)
            if job.get("JobState") != "RUNNING" or self.events("finished"):
                continue
            struck.outcome = self._strike(kind, job, all_nodes)
            self.played.diary.append(f"{kind} {place}: {struck.outcome}, job {self.job_id} was on {job['NodeList']}")
        self._until("its job gone", lambda: not self._holding())
        self.played.starts = len(self.events(*story.ANNOUNCEMENTS))

    def _see_to_it(self, tasks: int) -> None:
        """Have the run's job running: wait, release or submit, whichever it takes."""
        began, released = time.monotonic(), 0.0
        while (job := self.cluster.job(self.job_id) if self.job_id else {}).get("JobState") != "RUNNING":
            if self.events("finished"):
                return
            if time.monotonic() > began + PATIENCE_SECONDS:
                raise GaveUpError(f"job {self.job_id} does not run: {job}")
            if job.get("JobState") == "PENDING":
                # Slurm keeps the two minutes between two starts so that the last one is gone from its node by then.
                waiting = job.get("Reason") == "BeginTime" or "held" in job.get("Reason", "")
                if (
                    waiting
                    and time.monotonic() > released + 10
                    and not self.cluster.tasks(f"SLURM_JOB_ID={self.job_id}")
                ):
                    released = time.monotonic()  # each release sets its start to now, so that it would never start
                    self.cluster.mend_nodes()
                    self.cluster.run(sys.executable, "-m", "cifar_hpc", "requeue", self.name, root=self.root)
            elif job.get("JobState") not in HOLDING:
                self._submit(tasks)
            time.sleep(0.2)

    def _submit(self, tasks: int) -> None:
        answer = self.cluster.run(
            sys.executable, "submit.py", str(self.root / "job.yaml"), "--name", self.name, "--cluster", "slurm",
            "--partition", "gpu", "--json", "--set", f"resources.tasks_per_node={tasks}", "resources.time=30",
            root=self.root,
        )  # fmt: skip
        self.job_id = json.loads(answer)["job_id"]

    def _holding(self) -> bool:
        return self.cluster.job(self.job_id).get("JobState") in HOLDING

    def _until(self, what: str, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise GaveUpError(f"{what}: not within {PATIENCE_SECONDS:g} s; {self.cluster.job(self.job_id)}")
            time.sleep(0.1)

    def _strike(self, kind: str, job: dict[str, str], which: float) -> str:
        run, node = self.cluster.run, job["NodeList"]
        if kind.startswith("scancel"):
            run(*kind.split(), self.job_id, check=False)
        elif kind in ("cancel", "requeue"):
            run(sys.executable, "-m", "cifar_hpc", kind, self.name, root=self.root, check=False)
        elif kind == "scontrol requeue":
            run("scontrol", "requeue", self.job_id, check=False)
        elif kind.startswith("kill"):
            pids = self.cluster.tasks(f"SLURM_JOB_ID={self.job_id}")
            chosen = pids if "all" in kind else pids[int(which * len(pids)) :][:1]
            for pid in chosen:
                os.kill(pid, signal.SIGKILL)
            if not chosen:
                return "not reached"
        elif kind == "urgent job":
            urgent = run("sbatch", "--parsable", "-p", "urgent", "--exclusive", f"--nodelist={node}", "-o", "/dev/null",
                         "--wrap=sleep 600").strip()  # fmt: skip
            self._until("preempted", lambda: self.cluster.job(self.job_id).get("JobState") != "RUNNING")
            run("scancel", urgent)
        else:
            run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
            self._until("off its node", lambda: not self.cluster.tasks(f"SLURMD_NODENAME={node}"))
            run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may be back
        return "struck"


def check_story(events: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the events of a run that a cluster has disturbed."""
    problems = []
    announced, newest, fallback = 0, 0, False
    for row in events:
        kind = row["event"]
        fallback = fallback or kind == "fallback"
        if kind in story.ANNOUNCEMENTS:
            if row["restart"] != announced:
                problems.append(f"start {announced} calls itself {row['restart']}")
            if row["step"] < newest and not fallback:
                problems.append(f"resumed at step {row['step']}, after step {newest} was on disk")
            announced += 1
            fallback = False
        elif kind == "checkpoint":
            newest = max(newest, row["step"])
        elif kind in ("checkpoint_failed", "fallback", "hang"):
            problems.append(f"nothing called for {row}")
    finished = [row for row in events if row["event"] == "finished"]
    if len(finished) != 1:
        problems.append(f"finished {len(finished)} times")
    return problems
