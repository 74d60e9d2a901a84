"""Doctor: what it makes of what Slurm, file systems and tasks say; and a whole look at a machine without Slurm."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cifar_hpc.__main__ import main
from cifar_hpc.cli.doctor import doctor, login, node
from cifar_hpc.cli.doctor.doctor import as_text, show
from cifar_hpc.cli.doctor.login import (
    SlurmChecks,
    check_file_system,
    check_free_space,
    check_locks,
    gpus_of,
    mount_of,
)
from cifar_hpc.cli.doctor.node import LOCK, PLAN, Finding, Plan, Task, TaskReport, hold_lock, is_locked, run_check
from cifar_hpc.config.io import Site
from cifar_hpc.config.spec import ResourcesSpec, Spec, TrainSpec
from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.slurm import client as slurm

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=YES GraceTime=30 MaxTime=1-00:00:00 Nodes=a[1-3,7],b2 PriorityTier=1 PreemptMode=REQUEUE State=UP TotalNodes=5
PartitionName=other AllowGroups=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED Nodes=c[01-02] PriorityTier=5 PreemptMode=CANCEL State=DOWN TotalNodes=2
PartitionName=urgent AllowGroups=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED Nodes=a[3-4] PriorityTier=10 PreemptMode=OFF State=UP TotalNodes=2
"""  # noqa: E501
CONFIG = """\
Configuration data as of 2026-11-25T20:00:00
AccountingStorageType   = accounting_storage/slurmdbd
JobRequeue              = 1
KillWait                = 5 sec
PreemptType             = preempt/partition_prio

Slurmctld(primary) at a0 is UP
"""
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:26 / /tmp rw - tmpfs tmpfs rw
40 22 0:40 / /home rw,relatime - nfs4 server:/home rw,vers=4.2,local_lock=none
41 22 0:41 / /home/my\\040lab rw,relatime - lustre mds:/lab rw,localflock
"""
PINS = {"torch": "2.12.1", "torchvision": "0.27.1", "submitit": "1.5.4", "rich": "15.0.0"}


HOSTS = {"a[1-3,7],b2": "a1 a2 a3 a7 b2", "c[01-02]": "c01 c02", "a[3-4]": "a3 a4", "a[1-2]": "a1 a2"}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Answers of Slurm's commands, by their first words; a cluster as scontrol describes it."""
    known = {
        "scontrol --version": "slurm 24.05.1\n",
        "scontrol show config": CONFIG,
        "scontrol show partition": PARTITIONS,
        **{f"scontrol show hostnames {nodes}": names for nodes, names in HOSTS.items()},
    }

    def command(arguments: Any) -> str:
        line = " ".join(arguments)
        for words, text in known.items():
            if line.startswith(words):
                return text
        raise SchedulerError(f"{arguments[0]} is not on PATH.")

    monkeypatch.setattr(slurm, "command", command)
    return known


def asked(**resources: Any) -> SlurmChecks:
    return SlurmChecks(ResourcesSpec(**resources))


def changed(checks: SlurmChecks, partition: dict[str, str], **config: str) -> SlurmChecks:
    """The same with other fields of the partition gpu and of the configuration."""
    checks.config = {**checks.config, **config}
    checks.partitions = {**checks.partitions, "gpu": {**checks.partitions["gpu"], **partition}}
    return checks


def test_slurms_words_are_read(answers: dict[str, str]) -> None:
    assert asked().config["KillWait"] == "5 sec" and asked().config["JobRequeue"] == "1"
    assert list(asked().partitions) == ["gpu", "other", "urgent"]
    assert asked().partition["PartitionName"] == "gpu"
    assert asked(partition="urgent,gpu").partition == asked().partitions["urgent"]


@pytest.mark.parametrize(
    ("resources", "status", "words"),
    [
        ({}, "ok", "gpu (the default): UP, 5 nodes, up to 1-00:00:00"),
        ({"partition": "urgent", "time": "30-00"}, "ok", "urgent: UP"),
        ({"partition": "gpu,urgent"}, "ok", "gpu: UP"),
        ({"partition": "gpus"}, "problem", "gpus is not there; there are: gpu, other, urgent"),
        ({"partition": "gpu,nowhere"}, "problem", "nowhere is not there"),
        ({"partition": "other"}, "problem", "other: DOWN"),
        ({"time": "2-00"}, "problem", "--time 2-00 is more"),
    ],
)
def test_partition(answers: dict[str, str], resources: dict[str, Any], status: str, words: str) -> None:
    finding = asked(**resources).check_partition()
    assert finding.status == status and words in finding.found, finding
    assert (finding.advice == "") == (status == "ok")


def test_without_a_default_partition_a_router_has_to_choose(answers: dict[str, str]) -> None:
    finding = changed(asked(), {"Default": "NO"}).check_partition()
    assert finding.status == "warning" and "router" in finding.found


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:4", 4),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:a100:2,gpu:h100:1,nvme:900", 3),
        ("(null)", 0),
        ("mps:100,gpu:1", 1),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("resources", "status", "words"),
    [
        ({"nodes": "2", "gpus_per_node": 4}, "ok", "in service: 3 with 4 GPUs, 5 with 0 GPUs; 3 out of service"),
        ({"nodes": "4", "gpus_per_node": 4}, "problem", "asked for: 4 with 4 GPUs each"),
        ({"nodes": "3-9", "gpus_per_node": 4}, "ok", "in service"),
        ({"nodes": "1", "gpus_per_node": 8}, "problem", "8 GPUs each"),
        ({"nodes": "8", "gpus_per_node": 0}, "ok", "in service"),
    ],
)
def test_nodes(answers: dict[str, str], resources: dict[str, Any], status: str, words: str) -> None:
    answers["sinfo"] = "2|idle|gpu:4\n1|mix|gpu:4\n5|alloc|(null)\n1|drain*|gpu:8\n2|down*|gpu:8\n"
    finding = asked(**resources).check_nodes()
    assert finding.status == status and words in finding.found, finding


def test_a_partition_whose_nodes_are_all_out(answers: dict[str, str]) -> None:
    answers["sinfo"] = "2|down*|gpu:8\n"
    assert asked().check_nodes().status == "problem"


@pytest.mark.parametrize(
    ("kind", "changes", "status", "words"),
    [
        ("preempt/partition_prio", {}, "ok", "by jobs of urgent (PreemptMode=REQUEUE): SIGTERM, 30 s of grace"),
        ("preempt/partition_prio", {"GraceTime": "0"}, "ok", "no grace: SIGTERM, SIGKILL 5 sec later"),
        ("preempt/partition_prio", {"PreemptMode": "CANCEL"}, "ok", "a run saves and requeues itself"),
        ("preempt/partition_prio", {"PreemptMode": "CANCEL", "GraceTime": "0"}, "warning", "no grace"),
        ("preempt/partition_prio", {"PreemptMode": "GANG,SUSPEND"}, "warning", "suspended"),
        ("preempt/partition_prio", {"PreemptMode": "OFF"}, "ok", "not preempted"),
        ("preempt/partition_prio", {"PriorityTier": "10"}, "ok", "no partition over the same nodes"),
        ("preempt/partition_prio", {"Nodes": "a[1-2]"}, "ok", "no partition over the same nodes"),
        ("preempt/none", {}, "ok", "not preempted"),
    ],
)
def test_preemption(answers: dict[str, str], kind: str, changes: dict[str, str], status: str, words: str) -> None:
    finding = changed(asked(), changes, PreemptType=kind).check_preemption()
    assert finding.status == status and words in finding.found, finding


@pytest.mark.parametrize(
    ("qos", "mode", "status", "words"),
    [
        (None, "REQUEUE", "ok", "the job's QOS decides by whom and how jobs are preempted (here PreemptMode=REQUEUE)"),
        ("low", "REQUEUE", "ok", "by jobs of the QOS high, normal (PreemptMode=REQUEUE): SIGTERM, 120 s of grace"),
        ("low", "GANG,SUSPEND", "warning", "suspended by jobs of the QOS high, normal (PreemptMode=GANG,SUSPEND)"),
        ("normal", "REQUEUE", "warning", "by jobs of the QOS high (PreemptMode=CANCEL): no grace: SIGTERM, SIGKILL 5"),
        ("team", "SUSPEND", "ok", "by jobs of the QOS team (PreemptMode=REQUEUE,WITHIN): SIGTERM, 10 s of grace"),
        ("high", "REQUEUE", "ok", "no QOS may preempt high"),
    ],
)
def test_preemption_by_qos(answers: dict[str, str], qos: str | None, mode: str, status: str, words: str) -> None:
    rows = "low||cluster|00:02:00\nnormal|low|cancel|00:00:00\nhigh|low,normal|off|00:00:00\n"
    answers["sacctmgr"] = rows + "team||requeue,within|00:00:10\n"
    unused = {"PreemptMode": "OFF", "GraceTime": "77"}
    finding = changed(asked(qos=qos), unused, PreemptType="preempt/qos", PreemptMode=mode).check_preemption()
    assert finding.status == status and words in finding.found, finding


def test_a_qos_that_cannot_be_asked_for_is_a_warning(answers: dict[str, str]) -> None:
    checks = changed(asked(qos="low"), {}, PreemptType="preempt/qos")
    (finding,) = run_check("preemption", checks.check_preemption)
    assert finding.check == "preemption" and finding.status == "warning"
    assert "sacctmgr is not on PATH" in finding.found


def test_a_suspended_run_is_not_said_to_be_called_hung(answers: dict[str, str]) -> None:
    assert "hung" not in changed(asked(), {"PreemptMode": "GANG,SUSPEND"}).check_preemption().advice


@pytest.mark.parametrize(
    ("resources", "status", "words"),
    [
        ({}, "ok", "yours: lab, other"),
        ({"account": "Lab"}, "ok", "asked for: Lab"),
        ({"account": "their"}, "problem", "yours: lab, other; asked for: their"),
        ({"account": "lab", "qos": "high"}, "problem", "QOS high is not among yours: normal, preempt"),
        ({"account": "lab", "qos": "preempt"}, "ok", "lab"),
    ],
)
def test_account(answers: dict[str, str], resources: dict[str, Any], status: str, words: str) -> None:
    answers["sacctmgr"] = "lab||normal,preempt\nother||high\n"
    finding = asked(**resources).check_account()
    assert finding.status == status and words in finding.found, finding


def test_requeue_and_accounting_that_are_off(answers: dict[str, str]) -> None:
    assert asked().check_requeue().status == "ok"
    assert asked(requeue=False).check_requeue().status == "warning"
    assert "no accounting" in changed(asked(), {}, AccountingStorageType="(null)").check_account().found


def test_a_slurm_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise SchedulerError("Slurm is installed but does not answer")

    monkeypatch.setattr(slurm, "answers", refuse)
    finding = asked().check_slurm()
    assert finding.status == "problem" and "does not answer" in finding.found


@pytest.mark.parametrize(
    ("path", "point", "kind", "option"),
    [
        ("/srv", "/", "ext4", "relatime"),
        ("/tmp/x", "/tmp", "tmpfs", "rw"),
        ("/home/me", "/home", "nfs4", "local_lock=none"),
        ("/home/my lab/x", "/home/my lab", "lustre", "localflock"),
        ("/tmpx", "/", "ext4", "rw"),
    ],
)
def test_mounts(path: str, point: str, kind: str, option: str) -> None:
    found = mount_of(Path(path), MOUNTS)
    assert found[:2] == (point, kind) and option in found[2]


def test_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "_mountinfo", lambda: MOUNTS.replace("/tmp", str(tmp_path)))
    finding = check_file_system(tmp_path, False)
    assert finding.status == "warning" and "own disk" in finding.found
    assert check_locks(tmp_path).status == "ok"
    assert check_file_system(tmp_path, True).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_locks_that_stay_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = MOUNTS.replace("/home/my\\040lab", str(tmp_path))
    monkeypatch.setattr(login, "LOCAL_FOLDERS", ())
    monkeypatch.setattr(login, "_mountinfo", lambda: mounts)
    finding = check_file_system(tmp_path, False)
    assert finding.status == "ok" and "lustre" in finding.found
    assert check_locks(tmp_path).status == "warning" and "localflock" in check_locks(tmp_path).found


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = check_file_system(tmp_path / "file" / "root", True)
    assert finding.status == "problem" and "CIFAR_HPC_ROOT" in finding.advice


@pytest.mark.parametrize(("free", "status"), [(1e8, "problem"), (2e9, "warning"), (1e12, "ok")])
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(login.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert check_free_space(tmp_path).status == status


def test_requirements() -> None:
    assert login.parse_requirements("# a\ntorch==2.12.1\nPy_x.y-z==1  # why\nother>=2\n") == {
        "torch": "2.12.1",
        "Py_x.y-z": "1",
    }
    plan = login.plan_of(Spec(), Path("/root"))
    assert set(plan.pins) >= {"torch", "submitit", "shtab"} and plan.data.startswith("/root/")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "4 packages"),
        ({"torch": "2.12.1+cu130"}, "ok", "4 packages"),
        ({"torch": "2.11.0"}, "warning", "torch 2.11.0 (pinned: 2.12.1)"),
        ({"rich": None, "torch": "2.11.0"}, "problem", "not installed: rich"),
    ],
)
def test_packages(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], status: str, words: str) -> None:
    versions = {**PINS, **changes}
    found = {name: [SimpleNamespace(version=version)] if version else [] for name, version in versions.items()}
    monkeypatch.setattr(node.metadata, "distributions", lambda name: found[name])
    finding = node.check_packages(plan())
    assert finding.status == status and words in finding.found


def test_a_profile_that_is_wrong_is_a_problem_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partitoin: gpu}\n")
    finding, site, spec = login.read_site(str(path), {})
    assert finding.status == "problem" and "did you mean 'partition'" in finding.found
    assert site == Site() and spec.resources.gpus_per_node == 1
    path.write_text("setup: ['if true']\n")
    assert "no valid shell code" in login.read_site(str(path), {})[0].found
    path.write_text("python: apptainer exec 'my.sif python\n")
    assert login.read_site(str(path), {})[0].status == "problem"


def plan(**changes: Any) -> Plan:
    fields = {"pins": PINS, "source": "synthetic", "data": "/d", "gpus": 0, "requeue": True, "python": "3.11.7"}
    return Plan(**fields | changes)


def test_torch_that_cannot_be_imported_and_one_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node.check_torch(plan()).status == "ok"
    monkeypatch.setattr(node, "SLOW_IMPORT_SECONDS", -1.0)
    assert node.check_torch(plan()).status == "warning"
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = node.check_torch(plan())
    assert finding.status == "problem" and "ModuleNotFoundError" in finding.found and finding.advice


@pytest.mark.parametrize(
    ("asked_for", "given", "usable", "cuda", "status", "words"),
    [
        (2, "2", True, "13.0", "ok", "2 on each node, usable by all tasks: A100"),
        (2, "2", False, "13.0", "problem", "Slurm gave 2 GPUs but CUDA is not usable (CUDA_VISIBLE_DEVICES=0,1)"),
        (2, "2", False, None, "problem", "built for the CPU only"),
        (2, "", False, "13.0", "problem", "Slurm gave no GPU"),
        (2, "1", True, "13.0", "problem", "2 were asked for, Slurm gave 1"),
        (0, "", False, None, "ok", "none were asked for"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, asked_for: int, given: str, usable: bool, cuda: str, status: str, words: str
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    finding = node.check_gpus(plan(gpus=asked_for))
    assert finding.status == status and words in finding.found and bool(finding.advice) == (status == "problem")


@pytest.mark.parametrize(
    ("seen", "cores", "apart", "status", "words", "advice"),
    [
        (4, 8, set(), "ok", "usable by all tasks: A100; 8 CPU cores a task; direct access (P2P) between all of", ""),
        (4, 4, {(0, 3), (3, 0)}, "ok", "direct access (P2P) between some of them", ""),
        (4, 1, set(), "warning", "1 CPU core a task; direct access (P2P) between all of them", "cpus_per_task"),
        (4, 3, set(), "warning", "3 CPU cores a task", "cpus_per_task"),
        (1, 8, set(), "warning", "8 CPU cores a task, but it sees only 1 GPU", "srun: [--gpu-bind=none]"),
        (2, 1, set(), "warning", "1 CPU core a task, but it sees only 2 GPUs", "srun: [--gpu-bind=none]"),
    ],
)
def test_what_a_task_has_beside_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
    seen: int,
    cores: int,
    apart: set[tuple[int, int]],
    status: str,
    words: str,
    advice: str,
) -> None:
    """Four GPUs a node: the cores of a task, and whether it sees the GPUs of the others and its own reaches them."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in apart)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    finding = node.check_gpus(plan(gpus=4))
    assert finding.status == status and words in finding.found and advice in finding.advice
    assert bool(advice) == bool(finding.advice)


def test_gpus_that_nobody_asked_for_are_not_missed() -> None:
    spec = Spec(resources=ResourcesSpec(gpus_per_node=2))
    assert login.plan_of(spec, Path("/root")).gpus == 2
    spec = Spec(resources=ResourcesSpec(gpus_per_node=2), train=TrainSpec(device="cpu"))
    assert login.plan_of(spec, Path("/root")).gpus == 0


@pytest.mark.parametrize(
    ("source", "data_here", "status", "advice"),
    [
        ("synthetic", True, "ok", ""),
        ("cifar10", True, "problem", "shared with the compute nodes"),
        ("cifar10", False, "warning", "downloads it"),
        ("folder", False, "problem", ""),
    ],
)
def test_images(tmp_path: Path, source: str, data_here: bool, status: str, advice: str) -> None:
    finding = node.check_data(plan(source=source, data=str(tmp_path / "none"), data_here=data_here))
    assert finding.status == status and advice in finding.advice and "HINT" not in finding.found


def test_another_python_than_on_the_login_node() -> None:
    finding = node.check_python(plan(python="3.9.1"))
    assert finding.status == "ok" and "on the login node 3.9.1" in finding.found and finding.advice


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The only task of a job, of which nothing has run yet."""
    for variable in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    (tmp_path / PLAN).write_text(json.dumps(vars(plan(pins={}))))
    return Task(tmp_path)


def reported(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "task-0.json").read_text())
    return found | {finding["check"]: finding for finding in found["findings"]}


def test_a_task_runs_all_checks_and_writes_what_it_found(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"Requeue": "1"})
    monkeypatch.setattr(slurm, "command", lambda _: node.signal.raise_signal(node.signal.SIGUSR2))
    with hold_lock(tmp_path / LOCK):
        task.run()
    found = reported(tmp_path)
    assert (found["rank"], found["node"], found["finished"]) == (0, "n1", True)
    assert {f["status"] for f in found["findings"]} == {"ok"}, found
    assert [f["check"] for f in found["findings"]] == [
        "locks", "python", "packages", "requeue", "torch", "gpus", "data", "all-reduce", "signals",
    ]  # fmt: skip


def test_a_task_without_torch_does_not_meet_the_others(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"Requeue": "1"})
    task.run()
    found = reported(tmp_path)
    assert [check for check in found if found[check] == {}] == [] and found["finished"]
    assert list(found)[-1] == "torch" and found["torch"]["status"] == "problem"
    assert found["locks"]["status"] == "warning" and "not seen" in found["locks"]["found"]


def test_a_check_that_fails_is_a_finding_and_the_next_ones_run(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_gpus(plan: Plan) -> Finding:
        raise RuntimeError("no memory")

    def check_all_reduce(plan: Plan) -> Finding:
        raise RuntimeError("no network")

    monkeypatch.setattr(node, "check_gpus", check_gpus)
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"Requeue": "1"})
    monkeypatch.setattr(task, "check_all_reduce", check_all_reduce)
    task.run()
    found = reported(tmp_path)
    assert found["locks"]["found"] == "No such file or directory"
    assert (
        found["gpus"]["status"] == "problem"
        and found["gpus"]["found"] == "it could not be checked: RuntimeError: no memory"
    )
    assert found["data"]["status"] == "ok" and "signals" not in found


def test_a_check_that_hangs_is_named(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda status: None)
    task._give_up("all-reduce")
    assert reported(tmp_path)["finished"] and "not finished within" in reported(tmp_path)["all-reduce"]["found"]


def test_a_container_without_scontrol_and_a_site_without_requeue(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, status in (("1", "ok"), ("0", "problem")):
        monkeypatch.setattr(slurm, "job_fields", lambda _, answer=answer: {"Requeue": answer})
        assert task.check_requeue(plan()).status == status
    assert task.check_requeue(plan(requeue=False)).status == "ok"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    finding = task.check_requeue(plan())
    assert finding.status == "warning" and "scontrol is not on PATH" in finding.found and "container" in finding.advice


def test_a_signal_that_was_not_sent_is_not_one_that_was_not_heard(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "SIGNAL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "command", lambda _: "")
    finding = task.check_signals(plan())
    assert finding.status == "problem" and "did not arrive" in finding.found
    task.signalled.set()
    assert task.check_signals(plan()).status == "ok"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    finding = task.check_signals(plan())
    assert finding.status == "warning" and "scancel is not usable" in finding.found


def judged(change: Callable[[list[Finding]], Any] | None = None, **fields: Any) -> dict[str, Finding]:
    """The findings about two tasks, the second of them changed."""
    words = {"locks": "seen", "python": "3.11.7 (/p)", "torch": "torch 2", "all-reduce": "gloo in 4 ms"}
    findings = [Finding(check, "ok", found) for check, found in words.items()]
    tasks = [TaskReport(0, "n1", True, findings), TaskReport(1, "n2", True, list(findings))]
    if change is not None:
        change(tasks[1].findings)
    for name, value in fields.items():
        setattr(tasks[1], name, value)
    return {f.check: f for f in run_check("job", doctor.job_findings, "job 7 ended", 2, tasks, "last words")}


def test_a_job_without_problems() -> None:
    findings = judged()
    assert {f.status for f in findings.values()} == {"ok"}
    assert list(findings) == ["job", "job file system", "job locks", "job python", "job torch", "job all-reduce"]
    assert findings["job"].found == "2 of 2 tasks on n1, n2" and findings["job all-reduce"].found == "gloo in 4 ms"


@pytest.mark.parametrize(
    ("index", "finding", "status", "words"),
    [
        (0, Finding("locks", "warning", "not seen", "x"), "warning", "task 1 on n2: not seen"),
        (1, Finding("python", "ok", "3.12.1 (/p)"), "warning", "not the same on all nodes: 3.11.7 (/p), 3.12.1 (/p)"),
        (1, Finding("python", "ok", "3.11.7 (/q)"), "ok", "3.11.7 (/p)"),
        (2, Finding("torch", "problem", "import torch: x", "y"), "problem", "task 1 on n2: import torch: x"),
        (3, Finding("all-reduce", "problem", "not finished", "y"), "problem", "task 1 on n2: not finished"),
    ],
)
def test_of_the_tasks_findings_the_worst_counts(index: int, finding: Finding, status: str, words: str) -> None:
    found = judged(lambda findings: findings.__setitem__(index, finding))[f"job {finding.check}"]
    assert found.status == status and found.found == words
    assert bool(found.advice) == (status != "ok")
    assert ("NCCL_SOCKET_IFNAME" in found.advice) == (finding.check == "all-reduce")


def test_a_task_that_was_killed_is_named_and_the_other_is_judged() -> None:
    findings = judged(lambda findings: findings.clear(), finished=False)
    assert findings["job"].found == "task 1 on n2 ended too early: last words"
    assert findings["job"].status == "problem" and findings["job all-reduce"].status == "ok"


def test_a_task_that_did_not_come_back() -> None:
    (finding, *_) = doctor.job_findings("job 7 ended", 2, [TaskReport(0, "n1", True)], "last words")
    assert finding.status == "problem" and finding.found == "1 of 2 tasks on n1 came back: last words"


@pytest.mark.parametrize(("reason", "status"), [("Resources", "warning"), ("InvalidAccount", "problem")])
def test_a_job_that_did_not_start(reason: str, status: str) -> None:
    finding = doctor.not_started("7", reason)
    assert finding.status == status and f"did not start: {reason}" in finding.found and finding.advice


@pytest.mark.parametrize(
    ("output", "words"), [("", "nothing of it can be seen"), ("No module named 'torch'", "No module named 'torch'")]
)
def test_a_job_of_which_nothing_came_back(output: str, words: str) -> None:
    (finding,) = doctor.job_findings("job 7 ended as FAILED (NonZeroExitCode)", 1, [], output)
    assert finding.status == "problem" and words in finding.found and "FAILED" in finding.found and finding.advice


def test_a_job_that_is_interrupted_is_cancelled_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(doctor.batch_script, "sbatch", lambda option, script: "7")
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"JobState": "PENDING", "Reason": "Priority"})
    monkeypatch.setattr(slurm, "cancel_job", cancelled.append)

    def interrupt(words: str) -> None:
        if "queued (Priority)" in words:
            raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "say", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(doctor.check_job(tmp_path, Spec(), Site(), plan(), 60))
    assert cancelled == ["7"] and list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize(("finished", "kept"), [(True, []), (False, ["slurm"])])
def test_what_the_job_printed_is_kept_where_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, kept: list[str]
) -> None:
    def submit(option: str, script: str) -> str:
        (folder,) = (tmp_path / "logs").iterdir()
        report = {"rank": 0, "node": "n1", "finished": finished, "findings": []}
        (folder / "task-0.json").write_text(json.dumps(report))
        (folder / "slurm" / "7_0_log.out").write_text("last words\n")
        return "7"

    monkeypatch.setattr(doctor.batch_script, "sbatch", submit)
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"JobState": "COMPLETED", "Reason": "None"})
    found = run_check("job", doctor.check_job, tmp_path, Spec(), Site(), plan(), 60)
    assert found[0].check == "job" and found[0].status == ("ok" if finished else "problem")
    assert [path.name for folder in (tmp_path / "logs").iterdir() for path in folder.iterdir()] == kept


def test_a_lock_is_seen_by_others(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_lock(tmp_path / "lock"), pytest.raises(OSError, match=os.strerror(reason)):
        is_locked(tmp_path / "lock")
    finding = check_locks(tmp_path)
    assert finding.status == "warning" and "flock does not work here" in finding.found


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/plan.json"), "/x/plan.json: No space left on device"),
        (SpecError("the code cannot be copied"), "the code cannot be copied"),
    ],
)
def test_what_a_check_fails_at_is_a_finding(
    answers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(slurm, "answers", lambda: True)
    monkeypatch.setattr(login, "check_torch", lambda *_: [])
    monkeypatch.setattr(login, "check_file_system", fail)
    monkeypatch.setattr(doctor, "check_job", fail)
    assert main(["doctor", "--job", "--json"]) == 1
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)}
    assert list(found) == [
        "python", "site", "slurm", "partition", "nodes", "preemption", "requeue", "account", "file system", "job",
    ]  # fmt: skip
    assert {check for check, f in found.items() if f["status"] == "problem" and words in f["found"]} == {
        "file system",
        "job",
    }


def test_lines_are_whole_in_a_pipe_and_say_no_word_that_terminals_obey(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("job", "problem", "a\x1b[2J\nb " + "long " * 60, "do this"), Finding("x", "ok", "fine")]
    assert show(findings, as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem  job") and "a\\x1b[2J b long" in lines[0] and len(lines[0]) > 300
    assert lines[1].strip() == "-> do this"
    assert lines[-1] == "1 ok, 0 warnings, 1 problem"


def test_a_warning_that_the_job_has_disproved_is_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    doubts = ("partition", "account", "file system", "locks", "torch", "preemption")
    job = [Finding(check, "ok", "seen") for check in ("job", "job file system", "job torch")]
    findings = [*(Finding(check, "warning", "doubtful", "look") for check in doubts), *job]
    findings += [Finding("nodes", "problem", "too few"), Finding("job locks", "warning", "not seen")]
    assert show(iter(findings), as_json=True) == 1
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)}
    assert len(found) == len(findings)
    cleared = {"check": "file system", "status": "ok", "found": "the warning is taken back: seen", "advice": ""}
    assert found["file system"] == cleared
    assert [check for check in doubts if found[check]["status"] == "warning"] == ["locks", "preemption"]
    show(iter(findings), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "ok       torch            the warning is taken back: seen" in lines
    assert lines[-1] == "7 ok, 3 warnings, 1 problem"


def test_waiting_for_a_job_that_was_not_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--wait", "5"]) == 2
    assert "error: --wait: is how long the job of --job may wait. HINT: add --job." in capsys.readouterr().err


def test_lines_are_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = as_text(Finding("slurm", "warning", "word " * 40, "advice " * 20)).splitlines()
    assert lines[0].startswith("\x1b[33mwarning\x1b[0m  slurm ") and len(lines) > 4
    assert max(len(line) for line in lines[1:]) <= 80 and all(line.startswith("  ") for line in lines[1:])


@pytest.mark.process
def test_a_machine_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(slurm, "answers", lambda: False)
    assert main(["doctor", "--job", "--json"]) == 0
    findings = {f["check"]: f for f in json.loads(capsys.readouterr().out)}
    assert all(set(f) == {"check", "status", "found", "advice"} for f in findings.values())
    assert list(findings) == [
        "python", "site", "slurm", "file system", "locks", "free space", "packages", "torch", "data", "job",
    ]  # fmt: skip
    assert findings["slurm"]["status"] == "warning" and "only this machine" in findings["slurm"]["found"]
    assert findings["torch"]["status"] == "ok" and findings["data"]["status"] == "warning"
    assert list(tmp_path.iterdir()) == []
