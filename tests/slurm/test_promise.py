"""The promise under a real Slurm: whatever happens to a run, its weights and its log are those of an undisturbed one.

Each scenario acts when events.jsonl says that the run is in the middle of an epoch, and then compares the sums of the
final weights with a reference. Nothing is decided by how fast the machine is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE, PROJECT, Lab, Run, copy_project, freeze_mid_epoch

pytestmark = pytest.mark.slurm

GRACE = 30.0  # of the session's cluster
NARROW = """
model: {width_multiplier: 0.125, stem_width: 64, blocks: [1, 1, 1], dropout: 0.1}
train: {epochs: 4, batch_size: 32, device: cpu, cpu_threads: 1, shards: 2, log_seconds: 1}
data: {source: synthetic, train_size: 1500, test_size: 200}
lookahead: {bn_batches: 2}
checkpoint: {every_steps: 10}
resources: {gpus_per_node: 0, tasks_per_node: 2, time: 30}
"""
# The report's model as it is; few images, since this is a CPU.
FULL = (
    "train.epochs=2", "train.batch_size=32", "train.device=cpu", "train.cpu_threads=1", "train.shards=2",
    "data.source=folder", "data.train_size=160", "data.test_size=64", "lookahead.bn_batches=1",
    "checkpoint.every_minutes=null", "checkpoint.every_steps=2",
)  # fmt: skip
FULL_PARAMETERS = 4_903_082


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR_HPC_ROOT of all runs."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that whoever edits the original during these minutes disturbs no test."""
    return copy_project(PROJECT, tmp_path_factory.mktemp("project"))


@pytest.fixture
def lab(root: Path, project: Path, minicluster: Any) -> Iterator[Lab]:
    """The session's cluster, clear of jobs before and after."""
    yield from _clear_around(Lab(root, project, minicluster))


@pytest.fixture(scope="session")
def short_cluster(start_minicluster: Callable[..., Any]) -> Any:
    """A cluster with next to no grace, for what happens at its end."""
    return start_minicluster("--grace", "5", "--no-accounting")


@pytest.fixture
def short_lab(root: Path, project: Path, short_cluster: Any) -> Iterator[Lab]:
    """The same on the cluster with next to no grace."""
    yield from _clear_around(Lab(root, project, short_cluster))


def _clear_around(lab: Lab) -> Iterator[Lab]:
    try:
        lab.clear()
        yield lab
    finally:
        lab.clear()


@pytest.fixture(scope="session")
def narrow(root: Path) -> str:
    """The job file of the small model."""
    path = root / "narrow.yaml"
    path.write_text(NARROW)
    return str(path)


@pytest.fixture(scope="session")
def reference(root: Path, project: Path, narrow: str, minicluster: Any) -> Iterator[Callable[[], Run]]:
    """Begins the small model's undisturbed run, one plain process without Slurm; calling it waits for the end."""
    lab = Lab(root, project, minicluster)
    run = lab.run("reference")
    command = [sys.executable, "-m", "cifar_hpc", "train", narrow, "--name", run.name]
    with (root / "reference.out").open("w") as out:
        process = subprocess.Popen(command, cwd=project, env=lab.env, stdout=out, stderr=out)

    def finished() -> Run:
        assert process.wait(timeout=PATIENCE) == 0, (root / "reference.out").read_text()
        return run

    try:
        yield finished
    finally:
        process.kill()
        process.wait()


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

    from cifar_hpc.synthetic import CLASSES, make_synthetic

    train, train_labels, test, test_labels = make_synthetic(200, 80)
    for split, pixels, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / split / CLASSES[label] / f"{number}.png")
    return folder


def seconds(event: dict[str, Any]) -> float:
    """When an event was written."""
    return datetime.fromisoformat(event["time"]).timestamp()


def check_saved_where_it_stopped(run: Run, count: int = 1) -> int:
    """The `count`-th signal ended in a checkpoint of the very step it stopped at, in an epoch's middle."""
    signalled = run.wait("signal", count=count)
    saved = [e for e in run.events("checkpoint") if seconds(e) <= seconds(signalled)][-1]
    assert (saved["step"], saved["epoch"]) == (signalled["step"], signalled["epoch"]), run.report()
    assert saved["step_in_epoch"] > 0
    assert (run.checkpoints / saved["file"]).exists()
    return int(signalled["step"])


# ---------------------------------------------------------------------------------------------------- preemption


def test_partitions_that_cancel_or_give_no_grace(lab: Lab, narrow: str, reference: Callable[[], Run]) -> None:
    cancelable, nograce = lab.run("cancelable"), lab.run("nograce")
    cancelable.submit(narrow, "--partition", "cancelable", "--nodelist", "node1")
    nograce.submit(narrow, "--partition", "nograce", "--nodelist", "node2")
    freeze_mid_epoch(cancelable, nograce)
    with lab.urgent("-N2"):
        for run in (cancelable, nograce):
            assert run.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
            assert run.state()["state"] == "requeued"
    # Where Slurm would have forgotten the job, its own requeue has saved it.
    assert [e["reason"] for e in cancelable.events("requeued")] == ["preemption"]
    # Where Slurm requeues by itself, the run must not do it again.
    assert nograce.events("requeued") == []
    assert [e["reason"] for e in nograce.events("left")] == ["preemption"]
    steps = {run: check_saved_where_it_stopped(run) for run in (cancelable, nograce)}
    for run in steps:
        run.release()
    for run, step in steps.items():
        run.check_resumed_at(step)
        run.check_kept(reference())
        assert run.job()["Restarts"] == "1" and run.state()["restarts"] == 1


def test_without_scontrol_slurm_is_left_to_requeue(
    short_lab: Lab, narrow: str, reference: Callable[[], Run], tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            link = programs / program.name
            if program.name != "scontrol" and not link.is_symlink():
                link.symlink_to(program)
    profile = tmp_path / "bare.yaml"
    profile.write_text(f"setup: ['export PATH={programs}']\n")
    run = short_lab.run("no-scontrol")
    run.submit(narrow, "--profile", str(profile), "--partition", "gpu", "--nodelist", "node1")
    freeze_mid_epoch(run)
    with short_lab.urgent("--nodelist=node1"):
        assert "requeueing is left to Slurm" in run.wait("holding")["explanation"]
        assert run.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
    assert run.events("requeued", "requeue_failed", "left") == []
    log = (run.logs / "train.log").read_text()
    assert "scontrol is not on PATH" in log and "requeueing is left to Slurm" in log
    step = check_saved_where_it_stopped(run)
    run.release()
    run.check_resumed_at(step)
    run.check_kept(reference())


# --------------------------------------------------------------------------------- time limit, node failure, scancel


def test_time_limit(lab: Lab, narrow: str, reference: Callable[[], Run]) -> None:
    goes_on, gives_up = lab.run("timeout"), lab.run("no-timeouts")
    limited = [narrow, "--partition", "gpu", "--time", "30", "--set", "resources.warning_seconds=30"]
    goes_on.submit(*limited, "--nodelist", "node1")
    gives_up.submit(*limited, "timeouts.max=0", "--nodelist", "node2")
    # From the middle of an epoch on they have one minute left, however long it has taken them to get there.
    # Slurm looks at time limits every 30 s, so its warning comes with 30 to 60 s left.
    freeze_mid_epoch(goes_on, gives_up)
    for run in (goes_on, gives_up):
        lab.cluster.scontrol("update", f"jobid={run.job_id}", "EndTime=now+60")
    assert goes_on.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
    assert [e["reason"] for e in goes_on.events("requeued")] == ["timeout"]
    gives_up.wait("left")
    gives_up.wait_gone()
    assert gives_up.events("requeued") == []
    assert (state := gives_up.state())["state"] == "stopped" and "timeouts.max" in state["detail"]
    steps = {run: check_saved_where_it_stopped(run) for run in (goes_on, gives_up)}
    for run in steps:
        assert run.events("signal")[0]["signal"] == "SIGUSR2"

    lab.cluster.scontrol("update", f"jobid={goes_on.job_id}", "TimeLimit=30")  # it had become a minute or two
    goes_on.release()
    gives_up.submit(narrow, "--partition", "gpu", "--nodelist", "node2")
    for run, step in steps.items():
        run.check_resumed_at(step)
        run.check_kept(reference())
    assert goes_on.state()["requeues"] == {"timeout": 1}


def test_node_goes_down(lab: Lab, narrow: str, reference: Callable[[], Run]) -> None:
    run = lab.run("node-down")
    run.submit(narrow, "--partition", "gpu")
    freeze_mid_epoch(run)
    node = run.job()["NodeList"]
    try:
        assert lab.cluster.scontrol("update", f"nodename={node}", "state=down", "reason=test").returncode == 0
        assert run.wait_job(JobState="PENDING")["Restarts"] == "1"
        # This node is alive, and Slurm would trip over what is left there of the first start.
        assert lab.cluster.scontrol("update", f"jobid={run.job_id}", f"ExcNodeList={node}").returncode == 0
        run.release()
        resumed = run.wait("resumed")
    finally:
        lab.cluster.scontrol("update", f"nodename={node}", "state=resume")  # refused if it is back by itself
    assert run.job()["NodeList"] != node
    assert run.events("requeued") == []
    saved = [e for e in run.events("checkpoint") if seconds(e) <= seconds(resumed)][-1]
    assert resumed["step"] == saved["step"] and resumed["step_in_epoch"] > 0
    run.check_kept(reference())


def test_scancel_is_final_and_a_new_submission_goes_on(lab: Lab, narrow: str, reference: Callable[[], Run]) -> None:
    run = lab.run("scancelled")
    run.submit(narrow, "--partition", "gpu")
    freeze_mid_epoch(run)
    first = run.job_id
    lab.cluster.run(["scancel", first])
    assert run.wait_gone()["JobState"] == "CANCELLED"
    step = check_saved_where_it_stopped(run)
    assert run.inspect()["step"] == step
    assert run.state()["state"] == "cancelled"
    run.submit(narrow, "--partition", "gpu")
    assert run.job_id != first
    run.check_resumed_at(step)
    run.check_kept(reference())
    # Nothing has brought the first job back in the meantime.
    assert run.events("requeued") == []
    job = lab.cluster.job(first)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


# ----------------------------------------------------------------------------------------------- crash, one writer


def test_crash_of_a_run_that_nobody_else_may_write(lab: Lab, narrow: str, reference: Callable[[], Run]) -> None:
    run = lab.run("crashed")
    run.submit(narrow, "--partition", "gpu")
    run.wait("started")
    refused = run.submit(narrow, "--partition", "gpu", expect=4)
    assert refused["exit_code"] == 4 and f"job {run.job_id} " in refused["error"]
    freeze_mid_epoch(run)
    tasks = run.task_processes()
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGKILL)
    assert run.wait_gone()["JobState"] == "FAILED"
    state = run.state()
    assert state["state"] == "stopped" and "killed" in state["detail"]
    saved = run.events("checkpoint")[-1]
    assert run.inspect()["step"] == saved["step"]
    run.submit(narrow, "--partition", "gpu")
    run.check_resumed_at(saved["step"])
    run.check_kept(reference())
    assert run.events("requeued", "signal") == []


# ------------------------------------------------------------------------------------------------------ submission


def test_submission(lab: Lab, narrow: str, project: Path, tmp_path: Path) -> None:
    lab.project = copy_project(project, tmp_path / "project")  # one to break
    run = lab.run("submitted")
    short = [narrow, "--set", "train.epochs=1"]

    # Refused by Slurm, with its own words; the run stays free, even for another spec.
    refused = run.submit(*short, "train.seed=7", "--partition", "nonexistent", expect=3)
    assert "invalid partition specified: nonexistent" in refused["error"]
    assert run.events() == [] and list((run.logs / "slurm").iterdir()) == []

    estimate = lab.python("submit.py", *short, "--partition", "gpu", "--test-only").stdout
    assert "to start at" in estimate and lab.queued() == []

    held = [*short, "--partition", "gpu", "--sbatch", "hold"]
    said = lab.python("submit.py", *held, "--name", run.name, "--dry-run").stdout
    assert lab.queued() == [] and run.events() == []
    run.submit(*held)
    sent = (run.logs / "slurm" / f"{run.job_id}_submission.sh").read_text()
    assert said == sent + "\n"
    assert run.wait_job(JobState="PENDING")["Reason"] == "JobHeldUser"

    busy = run.submit(*held, expect=4)
    assert f"job {run.job_id} " in busy["error"] and lab.queued() == [run.job_id]

    # What happens to the project from here on is nothing to the job.
    (lab.project / "cifar_hpc" / "trainer.py").write_text("this is no Python\n")
    assert f"job {run.job_id} may start" in lab.command("requeue", run.name)
    run.wait("finished")
    assert run.wait_gone()["JobState"] == "COMPLETED"
    run.check_tidy()


# ------------------------------------------------------------------------------------------ the full model, two nodes


def test_full_model_on_two_nodes_is_preempted_and_goes_on(lab: Lab, images: Path) -> None:
    spec = ["--set", *FULL, f"data.root={images}", "--partition", "gpu", "--time", "30"]
    undisturbed, same, fewer = lab.run("full"), lab.run("full-preempted"), lab.run("full-fewer")

    undisturbed.submit(*spec, "--nodes", "2")  # one task on each node
    assert undisturbed.wait_job(JobState="RUNNING")["NodeList"] == "node[1-2]"
    undisturbed.wait("finished")
    undisturbed.wait_gone()
    assert undisturbed.events("started")[0]["world_size"] == 2
    final = undisturbed.inspect()
    assert (final["epoch"], final["step"], final["shards"]) == (2, 10, 2)
    parameters = "import sys, torch; print(sum(t.numel() for t in torch.load(sys.argv[1])['model'].values()))"
    assert int(lab.python("-c", parameters, final["file"]).stdout) == FULL_PARAMETERS

    for run in (same, fewer):
        run.submit(*spec, "--nodes", "2")
    freeze_mid_epoch(same, fewer)
    asked = time.time()
    with lab.urgent("-N2") as urgent:
        for run in (same, fewer):
            requeued = run.wait("requeued")
            assert requeued["reason"] == "preemption"
            step = check_saved_where_it_stopped(run)
            # Far inside the grace time, which began after the urgent job was sent.
            assert seconds(requeued) - asked < GRACE, run.report()
            assert run.wait_job(JobState="PENDING")["Restarts"] == "1"
        started = lab.cluster.wait_for(urgent, JobState="RUNNING")["StartTime"]
        assert datetime.fromisoformat(started).timestamp() - asked < GRACE  # the nodes were free before their time
        for run in (same, fewer):
            assert run.job()["JobState"] == "PENDING" and run.state()["state"] == "requeued"
        assert same.inspect()["step"] == same.events("signal")[0]["step"]
        lab.command("cancel", fewer.name)
        fewer.wait_gone()
        assert fewer.state()["state"] == "cancelled"

    same.release()
    fewer.submit(*spec, "--nodes", "1")
    for run, world_size in ((same, 2), (fewer, 1)):
        step = run.events("signal")[0]["step"]
        resumed = run.wait("resumed")
        assert (resumed["step"], resumed["world_size"]) == (step, world_size), run.report()
        run.check_kept(undisturbed)
        assert run.events("requeued") == run.events("requeued")[:1]
    assert same.job()["Restarts"] == "1"
