"""Doctor on a real Slurm: a job that tells what nodes are like, and leaves no trace unless something is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import PATIENCE, Lab, together, until

pytestmark = pytest.mark.slurm
# As a site with a container has it: a module to load, an option for GPUs of its own, and Python within something else.
PROFILE = """
resources: {{partition: gpu, comment: "preemption=yes;requeue=true"}}
gpus: gres=gpu:{{gpus}}
setup: ['export IMAGE="my image.sif"']
python: "'{container}' exec --nv \\"$IMAGE\\" '{python}'"
"""
CONTAINER = '#!/bin/sh\n[ "$1 $2 $3" = "exec --nv my image.sif" ] || exit 9\nshift 3\nexec "$@"\n'


def look(lab: Lab, *arguments: str, expect: int) -> dict[str, dict[str, Any]]:
    """doctor --json; the findings by check."""
    return {f["check"]: f for f in json.loads(lab.command("doctor", "--json", *arguments, expect=expect))}


def folders(lab: Lab) -> list[Path]:
    """What doctor's jobs have left."""
    return sorted((lab.root / "logs").glob(".doctor-*"))


def test_doctors_job(lab: Lab, tmp_path: Path) -> None:
    together(lambda: _nodes_with_gpus_that_are_none(lab, tmp_path), lambda: _a_python_that_is_not_there(lab, tmp_path))
    (kept,) = folders(lab)  # of the job that printed something
    assert [path.name for path in kept.iterdir()] == ["slurm"]


def _nodes_with_gpus_that_are_none(lab: Lab, tmp_path: Path) -> None:
    """All is well on the two nodes but for the GPUs, which are links to /dev/null."""
    container, profile = tmp_path / "con tainer", tmp_path / "site.yaml"
    container.write_text(CONTAINER)
    container.chmod(0o755)
    profile.write_text(PROFILE.format(container=container, python=sys.executable))
    found = look(lab, "--job", "--nodes", "2", "--profile", str(profile), expect=1)
    assert [check for check, f in found.items() if f["status"] == "problem"] == ["job gpus"], found
    assert "Slurm gave 1 GPU but CUDA is not usable" in found["job gpus"]["found"]
    assert found["job"]["found"] == "2 of 2 tasks on node1, node2"
    assert "gloo over 2 tasks" in found["job all-reduce"]["found"]
    assert found["job requeue"]["found"].endswith("Requeue=1")
    good = ("slurm", "partition", "nodes", "preemption", "requeue", "account", "torch", "job file system", "job locks")
    assert {found[check]["status"] for check in (*good, "job signals")} == {"ok"}, found
    assert "urgent" in found["preemption"]["found"] and "120 s of grace" in found["preemption"]["found"]
    assert found["partition"]["found"].startswith("gpu: UP, 2 nodes") and "2 with 4 GPUs" in found["nodes"]["found"]


def _a_python_that_is_not_there(lab: Lab, tmp_path: Path) -> None:
    profile = tmp_path / "wrong.yaml"
    profile.write_text("python: /no/such/python\n")
    found = look(lab, "--job", "--gpus-per-node", "0", "--profile", str(profile), expect=1)
    assert "/no/such/python" in found["job"]["found"] and "FAILED" in found["job"]["found"], found["job"]
    assert "job gpus" not in found


def test_a_job_that_does_not_start(lab: Lab) -> None:
    before = folders(lab)
    with lab.urgent("-N2", "--exclusive") as urgent:
        lab.cluster.wait_for(urgent, JobState="RUNNING")
        together(lambda: _given_up_by_doctor(lab), lambda: _given_up_by_the_user(lab))
        until("both jobs are gone", lambda: lab.queued() == [urgent])
    assert folders(lab) == before


def _given_up_by_doctor(lab: Lab) -> None:
    found = look(lab, "--job", "--wait", "0.02", "--gpus-per-node", "0", expect=0)
    assert found["job"]["status"] == "warning" and "did not start" in found["job"]["found"]


def _given_up_by_the_user(lab: Lab) -> None:
    """Ctrl-C while it waits."""
    command = [sys.executable, "-m", "cifar_hpc", "doctor", "--job", "--gpus-per-node", "0"]
    with subprocess.Popen(
        command, cwd=lab.project, env=lab.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "queued" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
