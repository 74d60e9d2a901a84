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
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.chaos import story, verdict
from tests.chaos.plan import RunPlan, deal
from tests.chaos.play import Played, Stage
from tests.chaos.ranks import PROJECT, clean_environment
from tests.chaos.show import Struck
from tests.chaos.trouble import Trouble

PATIENCE_SECONDS = 400.0  # only bounds a hang
KINDS = (
    "scancel --signal=TERM", "scancel --signal=USR1", "scancel --signal=USR2", "cancel", "requeue", "scontrol requeue",
    "kill a task", "kill all tasks", "urgent job", "node down", "lost logs", "lost checkpoints",
    "setup exits", "no python", "no code", "srun fails", "requeue refused once", "requeue refused",
    "requeue timed out", "scontrol empty", "sbatch timed out", "sbatch and squeue", "sbatch banner", "squeue silent",
)  # fmt: skip
BAD_STARTS = ("setup exits", "no python", "srun fails")
# Answers of scripted programs: the program, for which arguments, and what it does; once, but for a refusal for good.
TIMED_OUT = "error: Socket timed out on send/recv operation' >&2; exit 1"
SUBMITTED = ("sbatch", "*", f'$real "$@" > /dev/null; echo \'sbatch: {TIMED_OUT}')
ANSWERS = {
    "srun fails": [("srun", "*", "echo 'srun: error: Unable to create step: Unspecified error' >&2; exit 1")],
    "requeue refused once": [("scontrol", "requeue*", f"echo 'slurm_requeue {TIMED_OUT}")],
    "requeue refused": [("scontrol", "requeue*", "echo 'Requested operation is presently disabled' >&2; exit 1")],
    "requeue timed out": [("scontrol", "requeue*", f'$real "$@"; echo \'slurm_requeue {TIMED_OUT}')],
    "scontrol empty": [("scontrol", "show?job*", "exit 0")],
    "sbatch timed out": [SUBMITTED],
    "sbatch and squeue": [SUBMITTED, ("squeue", "*--format*", '[ ! -e "${arm%/*}/sbatch" ] || exit 0')],
    "sbatch banner": [("sbatch", "*", "echo; echo 'Welcome to job 1'; $real \"$@\"; echo '** quota: 7 %'; exit 0")],
    "squeue silent": [("squeue", "*", f"echo 'slurm_load_jobs {TIMED_OUT}")],
}
# Each start puts back what the one before lacked, and lacks what is armed.
SETUP = """PATH={bin}:$PATH
[ ! -e {bin}/away ] || mv {bin}/away {bin}/python
! rm {arms}/python 2> /dev/null || mv {bin}/python {bin}/away
! rm {arms}/setup 2> /dev/null || exit 3"""
PROGRAM = """#!/bin/sh
real={real} arm={arm}
[ ! -e "$arm" ] || . "$arm"
exec "$real" "$@"
"""
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
        if "submit.py" in command:
            environment["PATH"] = f"{root}/bin:{environment['PATH']}"
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
        except Exception as error:
            played.problems.append("".join(traceback.format_exception(error)))
        finally:
            self.run("scancel", f"--name={run.name}", check=False)
        if not played.problems:
            facts = self.stage.facts(root, run.name)
            played.problems += verdict.compare(facts, reference)
            played.problems += verdict.check_files(root, run.name, what.checkpoint["keep"], reference["final"]["rows"])
            bad = sum(s.kind in BAD_STARTS and s.outcome == "struck" for s in played.struck)
            lost = any(s.kind.startswith("lost") for s in played.struck)
            played.problems += check_story(run.events(), bad, lost)
        if not played.problems:
            shutil.rmtree(root)
        return played


class ClusterRun:
    """One run on the cluster."""

    def __init__(self, cluster: Cluster, root: Path, name: str, played: Played) -> None:
        self.cluster, self.root, self.name, self.played = cluster, root, name, played
        self.job_id = ""
        self._armed: Struck | None = None
        self.arms, programs = root / "arms", root / "bin"
        for folder in (self.arms, programs):
            folder.mkdir()
        setup = SETUP.format(bin=programs, arms=self.arms).split("\n")
        (root / "site.yaml").write_text(json.dumps({"python": f"{programs}/python", "setup": setup}))
        for name in ("python", "srun", "scontrol", "sbatch", "squeue"):
            real = sys.executable if name == "python" else shutil.which(name)
            (programs / name).write_text(PROGRAM.format(real=real, arm=self.arms / f"{name}-answer"))
            (programs / name).chmod(0o755)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The rows of events.jsonl, those of some kinds or all."""
        path = self.root / "logs" / self.name / "events.jsonl"
        rows, _ = story.split_lines(path.read_text() if path.exists() else "")
        return [row for row in rows if not kinds or row["event"] in kinds]

    def play(self, kinds: list[str], worlds: Sequence[int], rng: random.Random) -> None:
        """Strike with `kinds`, one after the other, and see the run to its end."""
        while not self.events("finished"):
            self._see_to_it(rng.choice(worlds))
            self._disarm()
            if not kinds:
                self._until("finished, or its job gone", lambda: self.events("finished") or not self._holding())
                continue
            kind, moment, share, all_nodes = kinds.pop(0), rng.choice(MOMENTS), rng.random(), rng.random()
            if kind in KINDS[10:]:  # what comes with the next start must not come after the last one
                moment = min(moment, 1)
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
            self._armed = struck if struck.outcome == "armed" else None
            self.played.diary.append(f"{kind} {place}: {struck.outcome}, job {self.job_id} was on {job['NodeList']}")
        self._until("its job gone", lambda: not self._holding())
        self._disarm()
        self._until("no process left", lambda: not self.cluster.tasks(f"SLURM_JOB_NAME={self.name}"))
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
        command = (
            sys.executable, "submit.py", str(self.root / "job.yaml"), "--name", self.name, "--cluster", "slurm",
            "--partition", "gpu", "--json", "--set", f"resources.tasks_per_node={tasks}", "resources.time=30",
            "--profile", str(self.root / "site.yaml"),
        )  # fmt: skip
        silent = self._armed is not None and self._armed.kind == "squeue silent"  # then it is refused, once
        answer = self.cluster.run(*command, root=self.root, check=not silent)
        again = '"job_id"' not in answer
        self.job_id = json.loads(self.cluster.run(*command, root=self.root) if again else answer)["job_id"]

    def _holding(self) -> bool:
        return self.cluster.job(self.job_id).get("JobState") in HOLDING

    def _until(self, what: str, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise GaveUpError(f"{what}: not within {PATIENCE_SECONDS:g} s; {self.cluster.job(self.job_id)}")
            time.sleep(0.1)

    def _disarm(self) -> None:
        """See whether what was armed was met, and take back what is left of it."""
        met = {path.stem for path in self.arms.glob("*.met")}
        left = {path.name for path in self.arms.glob("*") if path.suffix != ".met"} - met
        for path in self.arms.iterdir():
            path.unlink()
        if self._armed is not None:
            self._armed.outcome, self._armed = "not reached" if left else "struck", None

    def _arm(self, kind: str) -> None:
        """Have the next start, request or submission meet with trouble, and bring that about."""
        for program, arguments, text in ANSWERS.get(kind, ()):
            met = 'touch "$arm.met"' if kind == "requeue refused" else 'rm "$arm" 2> /dev/null'
            (self.arms / f"{program}-answer").write_text(f'case "$*" in {arguments}) ! {met} || {{ {text}; }};; esac\n')
        if kind in BAD_STARTS:
            if kind != "srun fails":
                (self.arms / kind.split()[-1].replace("exits", "setup")).touch()
            self.cluster.run("scontrol", "requeue", self.job_id, check=False)
            self._see_to_it(1)
            self._until("met", lambda: not any(self.arms.iterdir()) or not self._holding())
        elif "requeue" in kind or kind == "scontrol empty":
            self.cluster.run("scancel", "--signal=USR1", self.job_id, check=False)
            self._until("requeued or gone", lambda: self.cluster.job(self.job_id).get("JobState") != "RUNNING")
        else:
            self.cluster.run(sys.executable, "-m", "cifar_hpc", "cancel", self.name, root=self.root, check=False)
            self._until("gone", lambda: not self._holding())

    def _strike(self, kind: str, job: dict[str, str], which: float) -> str:
        run, node = self.cluster.run, job["NodeList"]
        if kind in ANSWERS or kind in BAD_STARTS:
            self._arm(kind)
            return "armed"
        if kind.startswith("lost"):
            trouble = Trouble(kind, 1, 0, 0, 0, False, self.name, self.root)
            trouble.begin()
            time.sleep(4 * which)
            trouble.end()
        elif kind == "no code":
            run("scontrol", "requeue", self.job_id, check=False)
            self._until("off its node", lambda: not self.cluster.tasks(f"SLURM_JOB_ID={self.job_id}"))
            code = self.root / "logs" / self.name / "code"
            away = code.rename(code.with_name("away"))
            self._see_to_it(1)
            time.sleep(4 * which)
            away.rename(code)
        elif kind.startswith("scancel"):
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


def check_story(events: list[dict[str, Any]], bad_starts: int, lost: bool) -> list[str]:
    """What is wrong with the events of a run that a cluster has disturbed.

    Args:
        bad_starts: how many starts failed before Python.
        lost: whether a folder was lost for a while.
    """
    problems = []
    newest, fallback = 0, False
    attempts: list[tuple[str, int]] = []
    failures: Counter[int] = Counter()
    for row in events:
        kind = row["event"]
        fallback = fallback or kind == "fallback"
        if kind == "attempt":
            attempts.append((row["job_id"], row["restart_count"]))
        elif kind == "failed":
            failures[len(attempts)] += 1
        if kind in story.ANNOUNCEMENTS:
            if row["restart"] != len(attempts) - 1 or row["job_id"] != attempts[-1][0]:
                problems.append(f"start {len(attempts) - 1} calls itself {row['restart']}: {row['job_id']}, {attempts}")
            if row["step"] < newest and not fallback:
                problems.append(f"resumed at step {row['step']}, after step {newest} was on disk")
            fallback = False
        elif kind == "checkpoint":
            newest = max(newest, row["step"])
        elif kind in ("fallback", "hang") or (kind == "checkpoint_failed" and not lost):
            problems.append(f"nothing called for {row}")
    # After a node failure Slurm counts starts whose script it never launched ("do not launch second copy").
    if any(later[0] == job and later[1] <= count for (job, count), later in pairwise(attempts)):
        problems.append(f"a start is recorded twice: {attempts}")
    if max(failures.values(), default=0) > 1 or failures.total() < bad_starts:
        problems.append(f"failures of each start: {dict(failures)}; {bad_starts} had to fail")
    finished = [row for row in events if row["event"] == "finished"]
    if len(finished) != 1:
        problems.append(f"finished {len(finished)} times")
    return problems
