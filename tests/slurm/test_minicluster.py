"""The minicluster tool itself, on a cluster of its own beside the session's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

TOOL = Path(__file__).resolve().parents[2] / "slurm" / "minicluster" / "minicluster"


def run_tool(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the tool in the environment of the tests."""
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def processes_naming(text: str) -> dict[int, str]:
    """Live processes, other than this one, whose command line or environment contains the text."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if text.encode() in command + (entry / "environ").read_bytes():
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


@pytest.fixture(scope="module")
def cluster(start_minicluster: Callable[..., Any]) -> Any:
    """A cluster of our own, which a test may take down. Three seconds of grace keep the tests short."""
    return start_minicluster("--grace", "3")


def test_up_again_changes_nothing(cluster: Any) -> None:
    before = (cluster.dir / "minicluster.json").read_text()
    again = cluster.tool("up", "--grace", "3")
    assert again.returncode == 0 and "already up" in again.stdout and "note:" not in again.stdout
    assert "grace=3 (asked: 7)" in cluster.tool("up", "--grace", "7").stdout
    assert (cluster.dir / "minicluster.json").read_text() == before


def test_output_is_not_held_open(cluster: Any) -> None:
    # run() with captured pipes returns only when every holder of the pipe's other end has closed it.
    for pid in processes_naming(f"CIFAR_HPC_MINICLUSTER={cluster.dir}\0"):
        links = [str(Path(f"/proc/{pid}/fd/{n}").readlink()) for n in (0, 1, 2)]
        assert all(link == "/dev/null" or link.startswith(str(cluster.dir)) for link in links), (pid, links)


@pytest.mark.parametrize("folder", ["my tmp", "long" * 30])
def test_a_folder_that_slurm_cannot_have_is_replaced(tmp_path: Path, folder: str) -> None:
    where = {**os.environ, "TMPDIR": str(tmp_path / folder)}
    assert (
        run_tool("env", env=where).stdout == f"export SLURM_CONF=/tmp/cifar_hpc-minicluster-{os.getuid()}/slurm.conf\n"
    )


def test_env_is_one_export_line(cluster: Any) -> None:
    assert cluster.tool("env").stdout == f"export SLURM_CONF={cluster.dir}/slurm.conf\n"


def test_status_tells_up_from_degraded(cluster: Any) -> None:
    good = cluster.tool("status")
    assert good.returncode == 0, good.stdout
    for name in (
        "munged",
        "mariadbd",
        "slurmdbd",
        "slurmctld",
        "slurmd-node1",
        "slurmd-node2",
        "cancelable",
        "nograce",
    ):
        assert name in good.stdout
    # Not down, from which a node comes back by itself with its next registration (ReturnToService=2).
    cluster.scontrol("update", "nodename=node2", "state=drain", "reason=test")
    assert cluster.tool("status").returncode == 1
    cluster.scontrol("update", "nodename=node2", "state=resume")
    end = time.monotonic() + 10
    while cluster.tool("status").returncode != 0:  # idle* until the node has answered the controller
        assert time.monotonic() < end
        time.sleep(0.2)


def test_daemons_listen_on_loopback_only(cluster: Any) -> None:
    ctld, _dbd, sql, *nodes = (int(p) for p in _marker(cluster)["settings"]["ports"])
    listening = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        host, port = address.split(":")
        if state == "0A":
            listening.add((host, int(port, 16)))
    for port in (
        ctld,
        sql,
        *nodes,
    ):  # not slurmdbd, which always takes every interface (munge's key guards it)
        assert ("0100007F", port) in listening and ("00000000", port) not in listening


def _marker(cluster: Any) -> dict[str, Any]:
    return json.loads((cluster.dir / "minicluster.json").read_text())


def test_job_over_both_nodes_is_accounted(cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = cluster.sbatch(
        "-N2", "--ntasks-per-node=2", "--cpus-per-task=2", "--gpus-per-node=2", f"--output={out}",
        "--wrap=srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'",
    )  # fmt: skip
    cluster.wait_for(job, JobState="COMPLETED")
    assert sorted(out.read_text().splitlines()) == ["node1 0,1"] * 2 + ["node2 0,1"] * 2
    end = time.monotonic() + 10
    while True:  # the accounting daemon learns of the end a moment later
        shown = cluster.run(["sacct", "-n", "-P", "-X", "-j", job, "-o", "State,Account,NNodes"]).stdout.strip()
        if shown == "COMPLETED|cifar|2" or time.monotonic() > end:
            break
        time.sleep(0.2)
    assert shown == "COMPLETED|cifar|2"


def test_urgent_job_preempts_and_the_preempted_is_requeued(cluster: Any) -> None:
    victim = cluster.sbatch("-p", "gpu", "-N2", "--exclusive", "--wrap=sleep 600")
    cluster.wait_for(victim, JobState="RUNNING")
    urgent = cluster.sbatch("-p", "urgent", "-N2", "--exclusive", "--wrap=sleep 1")
    requeued = cluster.wait_for(victim, JobState="PENDING")
    assert requeued["Restarts"] == "1"
    cluster.wait_for(urgent, JobState="COMPLETED")
    cluster.run(["scancel", victim])
    cluster.wait_for(victim, JobState="CANCELLED")


def test_two_jobs_share_a_node_but_no_gpu(cluster: Any, tmp_path: Path) -> None:
    wanted = ["-w", "node1", "-c4", "--gpus-per-node=2", "--open-mode=append", f"--output={tmp_path}/out"]
    jobs = [cluster.sbatch(*wanted, "--wrap=echo $CUDA_VISIBLE_DEVICES; sleep 60") for _ in range(2)]
    for job in jobs:
        assert cluster.wait_for(job, JobState="RUNNING")["NodeList"] == "node1"
    end = time.monotonic() + 10
    while (lines := sorted((tmp_path / "out").read_text().splitlines())) != ["0,1", "2,3"]:
        assert time.monotonic() < end, lines
        time.sleep(0.1)
    cluster.run(["scancel", *jobs])


def test_two_clusters_live_side_by_side(cluster: Any, minicluster: Any) -> None:
    assert os.environ["SLURM_CONF"] == str(minicluster.dir / "slurm.conf")
    names = set()
    for one in (cluster, minicluster):
        assert one.tool("status").returncode == 0
        done = one.run(["srun", "-n1", "printenv", "SLURM_CLUSTER_NAME"])
        assert done.returncode == 0, done.stderr
        names.add(done.stdout)
    assert len(names) == 2


def test_single_daemons_go_and_come_back_while_jobs_run(cluster: Any) -> None:
    job = cluster.sbatch("-N2", "--wrap=srun sleep 600")
    cluster.wait_for(job, JobState="RUNNING")
    for daemon in ("slurmdbd", "slurmd-node2", "slurmctld"):
        assert cluster.tool("stop", daemon).stdout == f"{daemon} is down\n"
        assert cluster.tool("stop", daemon).stdout == f"{daemon} is down already\n"
        if daemon != "slurmctld":  # sinfo would wait for it
            assert "DEAD" in (status := cluster.tool("status")).stdout and status.returncode == 1
        assert cluster.tool("start", daemon).stdout == f"{daemon} is up\n"
        assert cluster.tool("start", daemon).stdout == f"{daemon} is up already\n"
    assert cluster.job(job)["JobState"] == "RUNNING"
    unknown = cluster.tool("stop", "slurmd-node3")
    assert unknown.returncode == 1 and "there are: " in unknown.stderr and "slurmd-node2" in unknown.stderr
    cluster.run(["scancel", job])
    cluster.wait_for(job, JobState="CANCELLED")


def test_a_lost_node_takes_its_processes_along(cluster: Any) -> None:
    jobs = {node: cluster.sbatch("-w", node, "--wrap=srun sleep 600") for node in ("node1", "node2")}
    steps = {node: f"SLURM_JOB_ID={job}\0" for node, job in jobs.items()}
    end = time.monotonic() + 30
    while not all("sleep 600" in str(processes_naming(step)) for step in steps.values()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert cluster.tool("lose", "node1").stdout == "node1 is lost\n"
    assert not processes_naming(steps["node1"]) and processes_naming(steps["node2"])
    assert cluster.tool("status").returncode == 1
    cluster.scontrol("update", "nodename=node1", "state=down", "reason=lost")
    assert cluster.wait_for(jobs["node1"], JobState="PENDING")["Restarts"] == "1"
    assert cluster.job(jobs["node2"])["JobState"] == "RUNNING"
    assert cluster.tool("start", "slurmd-node1").returncode == 0
    cluster.run(["scancel", *jobs.values()])
    for job in jobs.values():
        cluster.wait_for(job, JobState="CANCELLED")


def test_half_dead_cluster_is_brought_up_anew(cluster: Any) -> None:
    pid, _ = _marker(cluster)["daemons"]["slurmd-node1"]
    os.kill(pid, 9)
    assert cluster.tool("status").returncode == 1
    again = cluster.tool("up", "--grace", "3", "--no-accounting")  # faster; no later test asks sacct
    assert again.returncode == 0 and again.stdout.startswith("up in"), again.stderr
    assert cluster.tool("status").returncode == 0


def test_down_leaves_nothing(cluster: Any) -> None:
    # A job that ignores SIGTERM and its child in another session must go; a mere user of SLURM_CONF stays.
    job = cluster.sbatch("-N2", "--wrap=trap '' TERM; setsid sleep 600 & srun sleep 600")
    cluster.wait_for(job, JobState="RUNNING")
    with subprocess.Popen(["sleep", "600"], env=cluster.env) as bystander:
        try:
            done = cluster.tool("down")
            assert done.returncode == 0, done.stderr
            assert not cluster.dir.exists()
            assert bystander.poll() is None
            left = processes_naming(str(cluster.dir))
            assert set(left) == {bystander.pid}, left
        finally:
            bystander.kill()
    again = cluster.tool("down")
    assert again.returncode == 0 and "nothing is up" in again.stdout
    assert cluster.tool("status").returncode == 1


@pytest.mark.usefixtures("cluster")  # skips where Slurm is missing
def test_failed_daemon_is_named_and_nothing_stays(tmp_path: Path) -> None:
    shim = tmp_path / "slurmd"
    shim.write_text("#!/bin/sh\necho broken on purpose >&2\nexit 7\n")
    shim.chmod(0o755)
    directory = Path("/tmp") / f"cmfail{os.getpid()}"
    env = dict(os.environ) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    try:
        done = run_tool("up", "--no-accounting", "--dir", str(directory), env=env)
        assert done.returncode == 1
        assert "slurmd-node1: ended with code 7" in done.stderr and "broken on purpose" in done.stderr
        assert not processes_naming(str(directory))
    finally:
        assert run_tool("down", "--dir", str(directory)).returncode == 0
    assert not directory.exists()


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    short = Path("/tmp") / f"cmforeign{os.getpid()}"
    short.mkdir()
    try:
        (short / "precious").write_text("x")
        for command in ("up", "down"):
            done = run_tool(command, "--dir", str(short))
            assert done.returncode in (1, 3) and done.stderr.startswith("minicluster: ")
        assert [p.name for p in short.iterdir()] == ["precious"]
    finally:
        (short / "precious").unlink()
        short.rmdir()


def test_missing_programs_are_listed_with_the_apt_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import mc_cluster
    import mc_config
    from mc_config import Settings

    monkeypatch.setattr(mc_config, "SEARCH_PATH", str(tmp_path))
    with pytest.raises(
        mc_cluster.MissingPackagesError,
        match=r"apt-get install .* munge slurmctld slurmd slurm-client slurmdbd",
    ):
        mc_cluster.Cluster("/tmp/cmnone").up(Settings())
    assert not Path("/tmp/cmnone").exists()


@pytest.mark.parametrize(
    ("directory", "words"),
    [("/tmp/" + "x" * 90, "path too long by"), ("/tmp/a b", "letters, digits")],
)
def test_impossible_directory_is_refused_clearly(directory: str, words: str) -> None:
    done = run_tool("up", "--dir", directory)
    assert done.returncode == 1 and words in done.stderr
    assert not Path(directory).exists()


def test_unknown_flag_is_an_argument_error() -> None:
    assert run_tool("up", "--bogus").returncode == 2
