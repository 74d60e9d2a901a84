"""Doctor: what it makes of what Slurm, file systems and tasks say; and a whole look at a machine without Slurm."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifar_hpc.__main__ import main
from cifar_hpc.cli.doctor import doctor, doctor_checks, doctor_files, doctor_slurm, doctor_submit
from cifar_hpc.cli.doctor.doctor_files import check_folder, hold_lock, is_locked, mount_of
from cifar_hpc.cli.doctor.doctor_report import Finding, Report, as_text
from cifar_hpc.cli.doctor.doctor_slurm import Cluster
from cifar_hpc.cli.doctor.doctor_submit import JobOutcome, doctors_job
from cifar_hpc.cli.doctor.doctor_verdict import judge_job
from cifar_hpc.config.site import Site
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


@pytest.fixture
def cluster() -> Cluster:
    """A cluster as scontrol describes it."""
    config = doctor_slurm.parse_config(CONFIG)
    return Cluster("slurm 24.05.1", config, doctor_slurm.parse_partitions(PARTITIONS))


def asked(**resources: Any) -> ResourcesSpec:
    return ResourcesSpec(**resources)


def test_slurms_words_are_read(cluster: Cluster) -> None:
    assert cluster.config["KillWait"] == "5 sec" and cluster.config["JobRequeue"] == "1"
    assert list(cluster.partitions) == ["gpu", "other", "urgent"]
    default = cluster.partition(None)
    assert default is not None and default["PartitionName"] == "gpu"
    assert cluster.partition("urgent,gpu") == cluster.partitions["urgent"]


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
def test_partition(cluster: Cluster, resources: dict[str, Any], status: str, words: str) -> None:
    finding = doctor_slurm.check_partition(cluster, asked(**resources))
    assert finding.status == status and words in finding.found, finding
    assert (finding.advice == "") == (status == "ok")


def test_without_a_default_partition_a_router_has_to_choose(cluster: Cluster) -> None:
    partitions = {name: {**fields, "Default": "NO"} for name, fields in cluster.partitions.items()}
    finding = doctor_slurm.check_partition(Cluster("", {}, partitions), asked())
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
    assert doctor_slurm.gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("resources", "status", "words"),
    [
        ({"nodes": "2", "gpus_per_node": 4}, "ok", "in service: 3 with 4 GPUs, 5 with 0 GPUs; 3 out of service"),
        ({"nodes": "4", "gpus_per_node": 4}, "problem", "4 nodes with 4 GPUs each are asked for"),
        ({"nodes": "3-9", "gpus_per_node": 4}, "ok", "in service"),
        ({"nodes": "1", "gpus_per_node": 8}, "problem", "8 GPUs each"),
        ({"nodes": "8", "gpus_per_node": 0}, "ok", "in service"),
    ],
)
def test_nodes(resources: dict[str, Any], status: str, words: str) -> None:
    rows = [("2", "idle", "gpu:4"), ("1", "mix", "gpu:4"), ("5", "alloc", "(null)"), ("1", "drain*", "gpu:8")]
    finding = doctor_slurm.judge_nodes([*rows, ("2", "down*", "gpu:8")], asked(**resources))
    assert finding.status == status and words in finding.found, finding


def test_a_partition_whose_nodes_are_all_out(cluster: Cluster) -> None:
    assert doctor_slurm.judge_nodes([("2", "down*", "gpu:8")], asked()).status == "problem"


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
def test_preemption(cluster: Cluster, kind: str, changes: dict[str, str], status: str, words: str) -> None:
    partition = {**cluster.partitions["gpu"], **changes}
    finding = doctor_slurm.check_preemption(
        Cluster("", {**cluster.config, "PreemptType": kind}, cluster.partitions), partition, asked()
    )
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
def test_preemption_by_qos(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, qos: str | None, mode: str, status: str, words: str
) -> None:
    rows = "low||cluster|00:02:00\nnormal|low|cancel|00:00:00\nhigh|low,normal|off|00:00:00\n"
    monkeypatch.setattr(slurm, "command", lambda _: rows + "team||requeue,within|00:00:10\n")
    config = {**cluster.config, "PreemptType": "preempt/qos", "PreemptMode": mode}
    partition = {**cluster.partitions["gpu"], "PreemptMode": "OFF", "GraceTime": "77"}  # which count for nothing
    finding = doctor_slurm.check_preemption(Cluster("", config, {}), partition, asked(qos=qos))
    assert finding.status == status and words in finding.found, finding


def test_a_qos_that_cannot_be_asked_for_is_a_warning(cluster: Cluster) -> None:
    config = {**cluster.config, "PreemptType": "preempt/qos"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        finding = doctor_slurm.check_preemption(Cluster("", config, {}), cluster.partitions["gpu"], asked(qos="low"))
    assert finding.status == "warning" and "sacctmgr is not on PATH" in finding.found


def test_a_suspended_run_is_not_said_to_be_called_hung(cluster: Cluster) -> None:
    partition = {**cluster.partitions["gpu"], "PreemptMode": "GANG,SUSPEND"}
    assert "hung" not in doctor_slurm.check_preemption(cluster, partition, asked()).advice


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
def test_account(resources: dict[str, Any], status: str, words: str) -> None:
    rows = [("lab", "", "normal,preempt"), ("other", "", "high")]
    finding = doctor_slurm.judge_account(rows, "me", asked(**resources))
    assert finding.status == status and words in finding.found, finding


def test_requeue_and_accounting_that_are_off(cluster: Cluster) -> None:
    assert doctor_slurm.check_requeue(cluster, asked()).status == "ok"
    assert doctor_slurm.check_requeue(cluster, asked(requeue=False)).status == "warning"
    assert "no accounting" in doctor_slurm.check_account(Cluster("", {}, {}), asked()).found


def test_a_slurm_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise SchedulerError("Slurm is installed but does not answer")

    monkeypatch.setattr(slurm, "answers", refuse)
    finding, found = doctor_slurm.check_slurm()
    assert finding.status == "problem" and "does not answer" in finding.found and found is None


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
    assert (found.point, found.kind) == (point, kind) and option in found.options


def test_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_files, "_mountinfo", lambda: MOUNTS.replace("/tmp", str(tmp_path)))
    findings = {f.check: f for f in check_folder(tmp_path, alone=False)}
    assert findings["file system"].status == "warning" and "own disk" in findings["file system"].found
    assert findings["locks"].status == "ok"
    assert check_folder(tmp_path, alone=True)[0].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_locks_that_stay_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = MOUNTS.replace("/home/my\\040lab", str(tmp_path))
    monkeypatch.setattr(doctor_files, "LOCAL_FOLDERS", ())
    monkeypatch.setattr(doctor_files, "_mountinfo", lambda: mounts)
    findings = {f.check: f for f in check_folder(tmp_path, alone=False)}
    assert findings["file system"].status == "ok" and "lustre" in findings["file system"].found
    assert findings["locks"].status == "warning" and "localflock" in findings["locks"].found


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = check_folder(tmp_path / "file" / "root", alone=True)
    assert finding.status == "problem" and "CIFAR_HPC_ROOT" in finding.advice


@pytest.mark.parametrize(("free", "status"), [(1e8, "problem"), (2e9, "warning"), (1e12, "ok")])
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(doctor_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert {f.check: f.status for f in check_folder(tmp_path, alone=True)}["free space"] == status


def test_requirements() -> None:
    assert doctor_checks.parse_requirements("# a\ntorch==2.12.1\nPy_x.y-z==1  # why\nother>=2\n") == {
        "torch": "2.12.1",
        "Py_x.y-z": "1",
    }
    assert set(doctor_checks.required()) >= {"torch", "submitit", "shtab"}


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "4 packages"),
        ({"torch": "2.12.1+cu130"}, "ok", "4 packages"),
        ({"torch": "2.11.0"}, "warning", "torch 2.11.0 (pinned: 2.12.1)"),
        ({"rich": None, "torch": "2.11.0"}, "problem", "not installed here: rich"),
    ],
)
def test_packages(changes: dict[str, str | None], status: str, words: str) -> None:
    finding = doctor_checks.compare_packages("packages", {**PINS, **changes}, PINS, "here")
    assert finding.status == status and words in finding.found


def test_a_profile_that_is_wrong_is_a_problem_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partitoin: gpu}\n")
    finding, site, spec = doctor_checks.check_site(str(path), {})
    assert finding.status == "problem" and "did you mean 'partition'" in finding.found
    assert site == Site() and spec.resources.gpus_per_node == 1
    path.write_text("setup: ['if true']\n")
    assert "no shell" in doctor_checks.check_site(str(path), {})[0].found
    path.write_text("python: apptainer exec 'my.sif python\n")
    assert doctor_checks.check_site(str(path), {})[0].status == "problem"


TASK: dict[str, Any] = {
    "rank": 0, "node": "n1", "job_id": "7", "token": "t", "lock_seen": True, "gpus": 2, "python": "3.11.7",
    "executable": "/p", "packages": {k: v for k, v in PINS.items() if k != "rich"}, "data": None,
    "torch": {
        "version": "2.12.1", "built": "CUDA 13.0", "seconds": 3.0, "usable": True, "devices": ["A100", "A100"],
        "visible": "0,1",
    },
    "scontrol": "/usr/bin/scontrol", "requeue": "1", "signal": True,
    "all_reduce": {"backend": "nccl", "seconds": 0.004, "right": True},
}  # fmt: skip
GPUS = Spec(resources=ResourcesSpec(gpus_per_node=2))


def judged(change: Callable[[dict[str, Any]], Any] | None = None, spec: Spec = GPUS) -> dict[str, Finding]:
    """The findings about two tasks, the second of them changed."""
    tasks = [copy.deepcopy(TASK), copy.deepcopy(TASK) | {"rank": 1, "node": "n2"}]
    if change is not None:
        change(tasks[1])
    outcome = JobOutcome("7", "COMPLETED", "None", "t", 2, tasks, "last words")
    return {f.check: f for f in judge_job(outcome, spec, PINS, {"python": "3.11.7", "data": None})}


def test_a_job_without_problems() -> None:
    findings = judged()
    assert {f.status for f in findings.values()} == {"ok"}
    assert list(findings) == [
        "job", "job file system", "job locks", "job python", "job packages", "job torch", "job gpus", "job data",
        "job all-reduce", "job requeue", "job signals",
    ]  # fmt: skip
    assert "nccl over 2 tasks" in findings["job all-reduce"].found and "4 ms" in findings["job all-reduce"].found


@pytest.mark.parametrize(
    ("change", "check", "status", "words"),
    [
        (lambda t: t.update(error="all-reduce: not within 90 s"), "job", "problem", "task 1 on n2: all-reduce"),
        (lambda t: t.update(lock_seen=False), "job locks", "warning", "task 1 on n2"),
        (lambda t: t.update(python="3.12.1"), "job python", "warning", "not the same"),
        (lambda t: t["packages"].update(submitit=None), "job packages", "problem", "submitit"),
        (lambda t: t["packages"].update(torch="2.9"), "job packages", "warning", "torch 2.9"),
        (lambda t: t["torch"].update(error="ImportError: x"), "job torch", "problem", "ImportError: x"),
        (
            lambda t: t["torch"].update(usable=False),
            "job gpus",
            "problem",
            "task 1 on n2: Slurm gave 2 GPUs but CUDA is not usable (CUDA_VISIBLE_DEVICES=0,1)",
        ),
        (lambda t: t["torch"].update(usable=False, built=None), "job gpus", "problem", "built for the CPU only"),
        (lambda t: t.update(gpus=1), "job gpus", "problem", "2 were asked for, Slurm gave 1"),
        (lambda t: t.update(data="x is missing. HINT: y"), "job data", "problem", "x is missing."),
        (lambda t: t["all_reduce"].update(right=False), "job all-reduce", "problem", "did not add up"),
        (lambda t: t.pop("all_reduce"), "job all-reduce", "problem", "task"),
        (lambda t: t["all_reduce"].update(seconds=3.0), "job all-reduce", "warning", "3,000 ms"),
        (lambda t: t.update(signal=False), "job signals", "problem", "task 1 on n2 did not hear"),
    ],
)
def test_what_one_task_reports(change: Any, check: str, status: str, words: str) -> None:
    finding = judged(change)[check]
    assert finding.status == status and words in finding.found, finding
    assert finding.advice


def test_what_a_task_without_torch_cannot_tell_is_not_judged() -> None:
    def broken(task: dict[str, Any]) -> None:
        task["torch"] = {"error": "ImportError: libcuda.so.1"}
        task["signal"] = False  # the other one, which sends it, waited for this one
        del task["all_reduce"]

    findings = judged(broken)
    assert {f.check for f in findings.values() if f.status == "problem"} == {"job torch"}
    assert "job all-reduce" not in findings and "job signals" not in findings
    assert findings["job gpus"].status == "ok" and "job requeue" in findings
    task = copy.deepcopy(TASK) | {"torch": {"error": "x"}}
    outcome = JobOutcome("7", "COMPLETED", "None", "t", 1, [task])
    assert "job gpus" not in {f.check for f in judge_job(outcome, GPUS, PINS, None)}


@pytest.mark.parametrize(
    ("signals", "status", "words"),
    [
        ([None, False], "warning", "scancel is not usable"),
        (["-", "-"], "warning", "not tried: the job did not come so far"),
        (["-", False], "warning", "not tried: the job did not come so far"),  # who sends it is rank 0
        ([True, "-"], "ok", "reached every task that came so far"),
        ([False, False], "problem", "task 0 on n1 did not hear"),
    ],
)
def test_a_signal_that_was_not_tried_is_not_one_that_was_not_heard(signals: Any, status: str, words: str) -> None:
    tasks = [copy.deepcopy(TASK), copy.deepcopy(TASK) | {"rank": 1, "node": "n2"}]
    for task, signal in zip(tasks, signals, strict=True):
        task["signal"] = signal
        if signal == "-":
            del task["signal"]
    outcome = JobOutcome("7", "COMPLETED", "None", "t", 2, tasks, "")
    finding = next(f for f in judge_job(outcome, GPUS, PINS, None) if f.check == "job signals")
    assert finding.status == status and words in finding.found, finding


def test_a_container_without_scontrol_and_a_site_without_requeue() -> None:
    def job(**changes: Any) -> Finding:
        outcome = JobOutcome("7", "COMPLETED", "None", "t", 1, [copy.deepcopy(TASK) | changes], "")
        return next(f for f in judge_job(outcome, GPUS, PINS, None) if f.check == "job requeue")

    assert job(scontrol=None).status == "warning" and "container" in job(scontrol=None).advice
    assert job(requeue="0").status == "problem"
    assert job(scontrol_error="refused").status == "warning"


def test_a_task_that_failed_early_is_named_and_the_other_is_judged() -> None:
    def early(task: dict[str, Any]) -> None:
        for key in set(task) - {"rank", "node", "token"}:
            del task[key]
        task["error"] = "OSError: no memory"

    findings = judged(early)
    assert findings["job"].found == "task 1 on n2: OSError: no memory"
    assert findings["job gpus"].status == "ok" and findings["job all-reduce"].status == "problem"
    outcome = JobOutcome("7", "COMPLETED", "None", "t", 1, [{"rank": 0, "node": "n", "token": "t", "error": "x"}])
    assert [f.check for f in judge_job(outcome, GPUS, PINS, None)] == ["job", "job file system", "job locks"]


def test_gpus_that_nobody_asked_for_are_not_missed() -> None:
    spec = Spec(train=TrainSpec(device="cpu"))
    assert judged(lambda t: t["torch"].update(usable=False), spec)["job gpus"].status == "ok"


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (JobOutcome("7", "PENDING", "Resources", "t", 1), "warning", "did not start: Resources"),
        (JobOutcome("7", "PENDING", "InvalidAccount", "t", 1), "problem", "InvalidAccount"),
        (JobOutcome("7", "FAILED", "NonZeroExitCode", "t", 1), "problem", "nothing of it can be seen"),
        (JobOutcome("7", "FAILED", "x", "t", 1, [], "No module named 'torch'"), "problem", "No module named"),
        (JobOutcome("7", "FAILED", "x", "t", 1, [{"token": "another"}]), "problem", "nothing of it can be seen"),
    ],
)
def test_a_job_of_which_nothing_came_back(outcome: JobOutcome, status: str, words: str) -> None:
    (finding,) = judge_job(outcome, GPUS, PINS, None)
    assert finding.check == "job" and finding.status == status and words in finding.found
    assert finding.advice


def test_a_job_that_is_interrupted_is_cancelled_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(doctor_submit.launcher, "submit_script", lambda script, code: "7")
    monkeypatch.setattr(slurm, "job_fields", lambda job_id: {"JobState": "PENDING", "Reason": "Priority"})
    monkeypatch.setattr(slurm, "cancel", cancelled.append)

    def interrupt(words: str) -> None:
        if "queued (Priority)" in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), doctors_job(tmp_path, Spec(), Site(), PINS, 60, interrupt):
        pass
    assert cancelled == ["7"] and list((tmp_path / "logs").iterdir()) == []


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
    findings = {f.check: f for f in check_folder(tmp_path, alone=True)}
    assert findings["locks"].status == "warning" and "flock does not work here" in findings["locks"].found


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/plan.json"), "/x/plan.json: No space left on device"),
        (SpecError("the code cannot be copied"), "the code cannot be copied"),
    ],
)
def test_what_a_check_fails_at_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(doctor, "_look_at_slurm", lambda *_: Cluster(""))
    monkeypatch.setattr(doctor, "_look_at_torch", lambda *_: None)
    monkeypatch.setattr(doctor, "check_folder", fail)
    monkeypatch.setattr(doctor, "doctors_job", fail)
    assert main(["doctor", "--job", "--json"]) == 1
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)}
    assert list(found) == ["python", "site", "file system", "job"]
    assert all(found[check]["status"] == "problem" and words in found[check]["found"] for check in list(found)[2:])


def test_lines_are_whole_in_a_pipe_and_say_no_word_that_terminals_obey(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.add(Finding("job", "problem", "a\x1b[2J\nb " + "long " * 60, "do this"), Finding("x", "ok", "fine"))
    assert report.close() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem  job") and "a\\x1b[2J b long" in lines[0] and len(lines[0]) > 300
    assert lines[1].strip() == "-> do this"
    assert lines[-1] == "1 ok, 0 warnings, 1 problem"


def test_lines_are_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = as_text(Finding("slurm", "warning", "word " * 40, "advice " * 20)).splitlines()
    assert lines[0].startswith("\x1b[33mwarning\x1b[0m  slurm ") and len(lines) > 4
    assert max(len(line) for line in lines[1:]) <= 80 and all(line.startswith("  ") for line in lines[1:])


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
