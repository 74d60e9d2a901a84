"""Submitting a sweep to a stub of Slurm: one call, every point a run of its own, and only what is left."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from batch_scripts import options, run_with_stub_srun
from helpers import leftovers
from PIL import Image
from stub_slurm import StubSlurm

from cifar_hpc.cli import submit
from cifar_hpc.config.io import to_plain
from cifar_hpc.config.yaml_loader import read_mapping
from cifar_hpc.launch import worker
from cifar_hpc.runs.events import Finished, append_event
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths, all_runs, read_points
from cifar_hpc.runs.queue import queue

JOB = """
train: {epochs: 2}
data: {source: synthetic}
resources: {partition: gpu, time: 30}
sweep: {grid: {model.dropout: [0, 0.5]}, seeds: 2, parallel: 3}
"""


class Project:
    """A root, a sweep's job file, and a stub of Slurm."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.job, self.stub, self._capsys = (
            folder / "my root",
            folder / "job.yaml",
            StubSlurm(folder),
            capsys,
        )
        self.job.write_text(JOB)

    def submit(self, *arguments: str, expect: int = 0) -> str:
        """What submit.py prints; its exit status must be `expect`."""
        assert submit.main([str(self.job), *arguments]) == expect, self._capsys.readouterr().err
        captured = self._capsys.readouterr()
        return captured.out if expect == 0 else captured.err

    def points(self, *arguments: str) -> list[dict[str, Any]]:
        """The points that submit.py --json tells of."""
        points: list[dict[str, Any]] = json.loads(self.submit("--json", *arguments))["points"]
        return points

    def run(self, point: dict[str, Any]) -> RunPaths:
        return RunPaths(self.root, point["run"])

    def finish(self, point: dict[str, Any], epochs: int = 2) -> None:
        """As if the run had trained."""
        finished = Finished(step=0, epoch=epochs, test_accuracy=0.0, best={})
        append_event(self.run(point).events, finished, job_id="1", restart=0, world_size=1)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Project:
    made = Project(tmp_path, capsys)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(made.root))
    for name, value in made.stub.environment.items():
        monkeypatch.setenv(name, value)
    return made


def test_a_sweep_is_one_job_array_and_each_point_a_run(project: Project) -> None:
    answer = json.loads(project.submit("--json"))
    assert len(project.stub.calls()) == 1 and answer["job_id"] == "1"
    assert answer["cancel"].endswith("-m cifar_hpc cancel 'job-*'")
    points = answer["points"]
    assert [p["job_id"] for p in points] == ["1_0", "1_1", "1_2", "1_3"] and {p["state"] for p in points} == {
        "submitted"
    }
    assert [p["values"] for p in points][1] == {"model.dropout": 0, "train.seed": 1}
    sweep = SweepPaths(project.root, "job", 1)
    assert read_points(sweep.points) == [p["run"] for p in points]
    (code,) = sweep.code.iterdir()
    for point in points:
        run, spec = project.run(point), read_frozen(project.run(point))
        assert spec is not None and spec.train.seed == point["values"]["train.seed"] and spec.train.shards == 1
        assert "sweep" not in read_mapping(run.spec) and read_mapping(run.spec) == to_plain(spec)
        (event,) = read_jsonl(run.events)
        assert (event["event"], event["job_id"], event["code"]) == ("submitted", point["job_id"], code.name)
        assert not run.code.exists()
        (output,) = run.slurm.iterdir()
        assert output.resolve(strict=False) == sweep.slurm / f"{point['job_id']}_0_log.out"
    assert (code / "cifar_hpc" / "launch" / "worker.py").exists() and leftovers(project.root) == []
    assert [run.name for run in all_runs(project.root)] == sorted(p["run"] for p in points)


def test_the_array_asks_for_its_points_and_is_of_no_run(project: Project) -> None:
    asked = options(project.submit("--dry-run"))
    assert (asked["array"], asked["job-name"]) == ("0-3%3", "job:sweep")
    assert "dependency" not in asked  # a singleton would be of the array, and hold up the next one
    assert asked["output"] == f"{project.root}/logs/sweeps/job/1/slurm/%A_%a_0_log.out"
    asked = options(project.submit("--dry-run", "--set", "sweep.parallel=null", "--dependency", "afterok:7"))
    assert (asked["array"], asked["dependency"]) == ("0-3%4", "afterok:7")


def test_dry_run_lists_the_points_and_writes_nothing(project: Project) -> None:
    out = project.submit("--dry-run", "--name", "mine")
    assert "# 3 mine-" in out and "model.dropout=0.5 train.seed=1" in out
    assert not project.root.exists() and project.stub.calls() == []


def test_the_script_puts_the_task_where_submitit_looks_for_it(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path / "it's a `id`"))
    project.submit()
    sweep = SweepPaths(tmp_path / "it's a `id`", "job", 1)
    script = (sweep.slurm / "1_submission.sh").read_text()
    script = script.replace("# setup\n", "# setup\nSLURM_ARRAY_JOB_ID=1 SLURM_ARRAY_TASK_ID=2\n")
    script = script.replace("hpc_event attempt", "hpc_event finished")  # so that the epilog has nothing to say
    words = run_with_stub_srun(script, tmp_path)
    assert words[-1] == str(sweep.slurm)
    with (sweep.slurm / "1_2_submitted.pkl").open("rb") as file:
        task = pickle.load(file).function
    assert task == worker.Task(str(sweep.root), str(sweep.points))


def test_only_what_is_left_is_submitted(project: Project) -> None:
    first = project.points()
    again = project.submit()
    assert "nothing is left to submit, 4 of 4 queued" in again and f"run {first[0]['run']} is already" in again
    assert len(project.stub.calls()) == 1 and [
        p.name for p in SweepPaths(project.root, "job").sweep.glob("[0-9]*")
    ] == ["1"]

    project.stub.end("1_0", "1_1")
    project.finish(first[0])
    project.finish(first[1], epochs=1)  # of an earlier, shorter submission
    points = project.points()
    assert [p["state"] for p in points] == ["finished", "submitted", "left out", "left out"]
    assert [p["job_id"] for p in points] == [None, "2_0", None, None]
    assert "1_2 (PENDING)" in points[2]["reason"]
    assert project.stub.queued() == ["1_2", "1_3", "2_0"]

    project.stub.end()
    for point in points:
        project.finish(point)
    assert "nothing is left to submit, 4 of 4 finished" in project.submit()
    assert len(project.stub.calls()) == 2


def test_a_point_is_found_by_its_run_and_refused_alone(project: Project) -> None:
    points = project.points()
    jobs = queue(project.root)
    assert {run: job.job_id for run, job in jobs.items()} == {p["run"]: p["job_id"] for p in points}
    alone = ["--set", "sweep=null", "model.dropout=0.5", "train.seed=0"]
    assert f"run {points[2]['run']} is already in the queue as job 1_2" in project.submit(*alone, expect=4)
    project.stub.end("1_2")
    assert f"run          {points[2]['run']}" in project.submit(*alone)
    assert [p["state"] for p in project.points()] == ["left out"] * 4
    SweepPaths(project.root, "job", 1).points.write_text("[1]")
    assert list(queue(project.root)) == [points[2]["run"]]


def test_a_point_that_trains_or_is_being_submitted_is_left_out(project: Project) -> None:
    points = json.loads(project.submit("--json", "--set", "sweep.seeds=3"))["points"]
    project.stub.end()
    locks = [RunLock(project.run(points[0]).lock), RunLock(project.run(points[1]).logs / "submit.lock")]
    for lock in locks:
        lock.acquire({"job_id": "9", "pid": 1, "host": "n1"})
    found = project.points()
    assert [p["state"] for p in found] == ["left out", "left out", "submitted", "submitted"]
    assert "being trained by job 9" in found[0]["reason"] and "being submitted" in found[1]["reason"]
    for lock in locks:
        lock.release()


def test_two_submissions_of_a_sweep_at_once(project: Project) -> None:
    lock = RunLock(SweepPaths(project.root, "job").sweep / "submit.lock")
    lock.acquire({"pid": 1})
    assert "sweep job is being submitted" in project.submit(expect=4)
    lock.release()
    assert project.stub.calls() == []


def test_a_refused_array_leaves_everything_as_it_was(project: Project) -> None:
    points = project.points("--set", "sweep.seeds=[0]")
    project.stub.end()
    before = {run.name: run.spec.read_bytes() for run in all_runs(project.root)}
    project.stub.refuse(True)
    error = project.submit("--time", "60", expect=3)
    assert "Invalid job array specification HINT: an array has at most MaxArraySize" in error
    assert {run.name: run.spec.read_bytes() for run in all_runs(project.root)} == before
    assert len(before) == len(points) == 2
    assert sorted(p.name for p in SweepPaths(project.root, "job").sweep.iterdir()) == ["1", "submit.lock"]
    project.stub.refuse(False)
    assert [p["state"] for p in project.points("--time", "60")] == ["submitted"] * 4


def test_a_point_started_under_another_spec_is_refused_before_anything_is_frozen(project: Project) -> None:
    points = project.points()
    project.stub.end()
    run = project.run(points[1])
    append_line(run.events, '{"event": "started", "job_id": "1_1", "restart": 0, "step": 0}')
    run.spec.write_text(run.spec.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    assert f"run {points[1]['run']}: it was started under another spec" in project.submit("--time", "60", expect=2)
    assert "time: '30'" in project.run(points[0]).spec.read_text() and len(project.stub.calls()) == 1


def test_a_first_point_that_finished_on_fewer_processes_refuses_no_other_point(project: Project) -> None:
    points = project.points("--set", "sweep.seeds=[0]", "resources.gpus_per_node=1")
    project.stub.end()
    for point in points:
        project.finish(point)
    wider = ("--set", "sweep.seeds=[0, 1]", "resources.gpus_per_node=2")
    assert points[0]["run"] not in project.submit("--dry-run", *wider)
    assert [point["state"] for point in project.points(*wider)] == ["finished", "submitted"] * 2


def test_the_logs_of_one_point_are_no_other_points(project: Project) -> None:
    points = project.points()
    shutil.rmtree(project.run(points[0]).logs)
    assert list(queue(project.root)) == [p["run"] for p in points]
    assert [p["state"] for p in project.points()] == ["left out"] * 4


def test_a_name_is_that_of_the_sweep_and_begins_those_of_its_runs(project: Project) -> None:
    points = project.points("--name", "mine")
    assert all(p["run"].startswith("mine-") for p in points) and (project.root / "logs/sweeps/mine/1").is_dir()
    assert "--name: 'sweeps' is not allowed" in project.submit("--name", "sweeps", expect=2)
    assert "--name: " in project.submit("--name", "x" * 95, expect=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--follow", ["--follow: a sweep is many runs", "status --watch"]),
        ("--set train.seed=4", ["--set train.seed: the sweep varies train.seed"]),
        ("--set sweep.seeds=0", ["sweep.seeds: 0"]),
        ("--set sweep.grid.resources.time=[1,2]", ["resources.time is not allowed"]),
        ("--set train.shards=1 --nodes 2", ["2 ranks are more than train.shards: 1"]),
        ("--set data.source=folder data.root=nowhere", ["nowhere is no folder"]),
        ("--cluster local --nodes 2", ["--nodes: 2 needs Slurm"]),
    ],
)
def test_bad_input_is_named_and_nothing_written(project: Project, arguments: str, words: list[str]) -> None:
    error = project.submit(*arguments.split(), expect=2)
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not project.root.exists() and project.stub.calls() == []


def test_the_size_of_a_folders_images_is_frozen_with_each_point(project: Project) -> None:
    for split in ("train", "test"):
        for name in ("daisy", "rose"):
            (project.root / "flowers" / split / name).mkdir(parents=True)
            Image.new("RGB", (48, 48)).save(project.root / "flowers" / split / name / "0.png")
    points = project.points("--set", "data.source=folder", "data.root=flowers")
    specs = [read_frozen(project.run(point)) for point in points]
    assert [spec.data.image_size for spec in specs if spec] == [48] * 4
    project.stub.end()
    assert project.points("--set", "data.source=folder", "data.root=flowers")[0]["run"] == points[0]["run"]


def test_too_few_open_files_are_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.append(both))
    project.points()
    assert limits == [(204, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 100))
    project.stub.end()
    assert "204 open files are needed" in project.submit(expect=2)


@pytest.mark.process  # sbatch is one, and it takes seconds
def test_a_thousand_points_are_one_call(project: Project) -> None:
    assert len(project.points("--set", "sweep.seeds=500")) == 1000
    assert len(project.stub.calls()) == 1 and len(project.stub.queued()) == 1000
    names = {path.name for path in SweepPaths(project.root, "job", 1).slurm.iterdir()}
    assert {n for n in names if not n.startswith(".submission_file_")} == {"1_submission.sh", "task.pkl"}
