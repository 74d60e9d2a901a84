"""The promise under a real Slurm, from submission to the end, for the model and the commands that a user has.

Each run stops itself at a precise step (moments/sitecustomize.py) until the test goes on, and its weights are then
compared with those of a run that nobody disturbed. Nothing is decided by how fast the machine is.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from lab import Lab, copy_project
from runs import Run

pytestmark = pytest.mark.slurm

# The report's model as it is; few images, since this is a CPU.
FULL = (
    "train.epochs=2", "train.batch_size=32", "train.device=cpu", "train.cpu_threads=1", "train.shards=2",
    "data.source=folder", "data.train_size=160", "data.test_size=64", "lookahead.bn_batches=1",
    "checkpoint.every_minutes=null", "checkpoint.every_steps=2",
)  # fmt: skip
FULL_PARAMETERS = 4_903_082


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as image files: the archive that CIFAR_HPC_TEST_IMAGES names, else drawn pictures in its layout."""
    folder = tmp_path_factory.mktemp("images")
    archive = os.environ.get("CIFAR_HPC_TEST_IMAGES")
    if archive:
        with tarfile.open(archive, "r|*") as tar:
            chosen = (m for number, m in enumerate(tar) if number % 50 == 0 or not m.isfile())
            tar.extractall(folder, members=chosen, filter="data")
        return folder / "cifar10-jpeg"
    from PIL import Image

    from cifar_hpc.data.synthetic import CLASSES, make_synthetic

    train, train_labels, test, test_labels = make_synthetic(200, 80)
    for split, pixels, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / split / CLASSES[label] / f"{number}.png")
    return folder


def test_submission(lab: Lab, short: str, project: Path, tmp_path: Path) -> None:
    lab.project = copy_project(project, tmp_path / "project")  # one to break
    run = Run(lab, "submitted")
    brief = [short, "--set", "train.epochs=1"]

    # Refused by Slurm, with its own words; the run stays free, even for another spec.
    refused = run.submit(*brief, "train.seed=7", "--partition", "nonexistent", expect=3)
    assert "invalid partition specified: nonexistent" in refused["error"]
    assert run.events() == [] and list((run.logs / "slurm").iterdir()) == []

    estimate = lab.python("submit.py", *brief, "--partition", "gpu", "--test-only").stdout
    assert "to start at" in estimate and lab.queued() == []

    held = [*brief, "--partition", "gpu", "--sbatch", "hold"]
    said = lab.python("submit.py", *held, "--name", run.name, "--dry-run").stdout
    assert lab.queued() == [] and run.events() == []
    run.submit(*held)
    sent = (run.logs / "slurm" / f"{run.job_id}_submission.sh").read_text()
    script, _, words = said.partition("\n# run ")
    assert script == sent and "# start        new run: 1 epoch, " in words
    assert run.wait_job(JobState="PENDING")["Reason"] == "JobHeldUser"

    busy = run.submit(*held, expect=4)
    assert f"job {run.job_id} " in busy["error"] and lab.queued() == [run.job_id]
    here = run.submit(*brief, "--cluster", "local", expect=4)
    assert f"job {run.job_id} " in here["error"] and run.events("submitted")[1:] == []

    # What happens to the project from here on is nothing to the job.
    (lab.project / "cifar_hpc" / "training" / "trainer.py").write_text("this is no Python\n")
    assert f"job {run.job_id} may start" in lab.command("requeue", run.name)
    run.wait("finished")
    assert run.wait_gone()["JobState"] == "COMPLETED"
    run.check_tidy()


def test_full_model_on_two_nodes_is_preempted_and_goes_on(lab: Lab, images: Path) -> None:
    spec = ["--set", *FULL, f"data.root={images}", "--partition", "gpu", "--time", "30"]
    undisturbed, same, fewer = Run(lab, "full"), Run(lab, "full-preempted"), Run(lab, "full-fewer")

    undisturbed.submit(*spec, "--nodes", "2")  # one task on each node
    assert undisturbed.wait_job(JobState="RUNNING")["NodeList"] == "node[1-2]"
    undisturbed.wait("finished")
    undisturbed.wait_gone()
    assert undisturbed.events("started")[0]["world_size"] == 2
    final = json.loads(lab.command("inspect", undisturbed.name, "--json"))
    assert final["verified"] and final == json.loads(json.dumps(undisturbed.inspect()))
    assert (final["epoch"], final["step"], final["shards"]) == (2, 10, 2)
    parameters = "import sys, torch; print(sum(t.numel() for t in torch.load(sys.argv[1])['model'].values()))"
    assert int(lab.python("-c", parameters, final["file"]).stdout) == FULL_PARAMETERS

    for run in (same, fewer):
        run.submit(*spec, "--nodes", "2", moments=["0/0:SIGSTOP@step:7"])
    for run in (same, fewer):
        run.stopped("step:7")
    with lab.urgent("-N2", "--exclusive") as urgent:
        for run in (same, fewer):
            # By itself: Slurm's own requeue, at the end of the grace time, would leave no such event.
            assert run.wait("requeued")["reason"] == "preemption"
            assert run.check_saved_where_it_stopped() == 8 == run.inspect()["step"]
            assert run.wait_job(JobState="PENDING")["Restarts"] == "1"
        lab.cluster.wait_for(urgent, JobState="RUNNING")
        for run in (same, fewer):
            assert run.job()["JobState"] == "PENDING" and run.state()["state"] == "requeued"
        lab.command("cancel", fewer.name)
        fewer.wait_gone()
        assert fewer.state()["state"] == "cancelled"

    same.release()
    fewer.submit(*spec, "--nodes", "1")
    for run, world_size in ((same, 2), (fewer, 1)):
        resumed = run.wait("resumed")
        assert (resumed["step"], resumed["world_size"]) == (8, world_size), run.report()
        run.check_kept(undisturbed)
        assert run.reasons() == ["preemption"]
    assert same.job()["Restarts"] == "1"
