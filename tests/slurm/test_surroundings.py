"""Runs from within other jobs: submitted by a task of an array, and trained by the tasks of a step."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial

import pytest
from lab import Lab, together
from runs import Run

from cifar_hpc.slurm.options import left_out

pytestmark = pytest.mark.slurm

# Each would change the job, or what its tasks take it for.
HOSTILE = {
    "SBATCH_PARTITION": "nowhere", "SBATCH_JOB_NAME": "other", "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "HUP@9",
    "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "1-3", "SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "1",
    "SUBMITIT_PREEMPT_SIGNAL": "HUP", "SRUN_CPUS_PER_TASK": "2", "RANK": "5", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "7",
    "CUDA_VISIBLE_DEVICES": "9", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "error",
}  # fmt: skip


def test_runs_from_within_other_jobs(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    together(
        partial(_submitted_by_an_array_task, Run(lab, "from-array"), short, reference),
        partial(_trained_by_a_step, Run(lab, "by-srun"), short, reference),
    )


def _submitted_by_an_array_task(run: Run, short: str, reference: Callable[[], Run]) -> None:
    seen = run.lab.root / "from-array.seen"
    profile = run.lab.root / "from-array.yaml"
    profile.write_text(json.dumps({"setup": [f"{{ ulimit -St; ulimit -Sn; env; }} > {shlex.quote(str(seen))}"]}))
    words = ["submit.py", short, "--partition", "gpu", "--mem", "1000", "--name", run.name, "--profile", str(profile)]
    lines = [
        f"cd {shlex.quote(str(run.lab.project))}",
        f"export CIFAR_HPC_ROOT={shlex.quote(str(run.lab.root))}",
        "ulimit -St 3000; ulimit -Sn 777",
        # By a program of its own: submit.py itself is not found with PYTHONSAFEPATH.
        f"export PYTHONPATH=. {shlex.join(f'{name}={value}' for name, value in HOSTILE.items())}",
        f"exec {shlex.join([sys.executable, *words])}",
    ]
    run.lab.cluster.sbatch("--array=3", "--mem-per-cpu=300", "--cpus-per-task=2", "--wrap", "\n".join(lines))
    run.job_id = run.wait("submitted")["job_id"]
    job = run.wait_gone()
    assert (job["JobName"], job["Partition"], job["TimeLimit"]) == (run.name, "gpu", "00:30:00")
    time, files, *variables = seen.read_text().splitlines()
    assert (time, files != "777") == ("unlimited", True)
    mine = dict(line.split("=", 1) for line in variables if "=" in line)
    assert (mine["SLURM_JOB_ID"], mine["SLURM_JOB_NAME"]) == (run.job_id, run.name)
    assert not [name for name in mine if name.startswith(("SLURM_ARRAY", "SLURM_MEM_PER_CPU", "SRUN_", "SBATCH_"))]
    assert mine.keys().isdisjoint(left_out(HOSTILE)) and set(left_out(HOSTILE)) == set(HOSTILE)
    script = (run.logs / "slurm" / f"{run.job_id}_submission.sh").read_text()
    assert all(words in script for words in ("#SBATCH --requeue\n", "#SBATCH --signal=USR2@", " SLURM_ARRAY_TASK_ID "))
    run.check_kept(reference())


def _trained_by_a_step(run: Run, short: str, reference: Callable[[], Run]) -> None:
    train = [sys.executable, "-m", "cifar_hpc", "train", short, "--name", run.name]
    step = ["srun", "-p", "gpu", "--nodes=2", "--ntasks=2", "--mem=1000", f"--chdir={run.lab.project}", *train]
    done = run.lab.cluster.run(["env", f"CIFAR_HPC_ROOT={run.lab.root}", *step], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["world_size"] for event in run.events("started")] == [2]
    assert run.inspect()["sums"] == reference().inspect()["sums"]
    run.check_tidy()
