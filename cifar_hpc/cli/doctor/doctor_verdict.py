"""From what the tasks of doctor's job report to findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cifar_hpc.cli.doctor.doctor_checks import compare_packages, without_hint
from cifar_hpc.cli.doctor.doctor_report import Finding
from cifar_hpc.cli.doctor.doctor_submit import HOPELESS, JobOutcome
from cifar_hpc.config.spec import Spec

Task = Mapping[str, Any]
NEEDED_ON_NODES = ("torch", "torchvision", "submitit", "pyyaml", "numpy")  # the others draw, export and show
LOOKED = {"lock_seen", "gpus", "python", "packages", "torch", "data", "scontrol"}  # what a task that got so far reports
SLOW_SECONDS = 1.0  # of an all-reduce; gloo over 1 Gbit/s Ethernet takes 0.3 s


def judge_job(
    outcome: JobOutcome, spec: Spec, pins: Mapping[str, str], here: Mapping[str, Any] | None
) -> list[Finding]:
    """All findings of doctor's job.

    Args:
        pins: as `doctor_checks.required`.
        here: `doctor_probe.facts` of the login node, where they are known.
    """
    if outcome.state == "PENDING":
        return [_not_started(outcome)]
    tasks = [task for task in outcome.tasks if task.get("token") == outcome.token]
    if not tasks:
        return [_nothing_came_back(outcome)]
    findings = [_ended(outcome, tasks), _shared(outcome, tasks), _locks(tasks)]
    whole = [task for task in tasks if task.keys() >= LOOKED]
    if whole:
        needed = {name: pins[name] for name in NEEDED_ON_NODES if name in pins}
        findings += [
            _python(whole, here),
            compare_packages("job packages", _worst_packages(whole, needed), needed, "on the nodes"),
            _torch(whole),
        ]
        able = [task for task in whole if "error" not in task["torch"]]
        findings += [_gpus(able, spec)] if able else []
        findings += [_data(whole, spec, here)]
        together = len(able) == len(whole)  # a task without torch neither meets the others nor waits for them
        findings += [_all_reduce(tasks)] if together else []
        findings += [_requeue(whole, spec)]
        findings += [_signals(tasks)] if together else []
    return findings


def _not_started(outcome: JobOutcome) -> Finding:
    words = f"job {outcome.job_id} did not start: {outcome.reason}; it is cancelled"
    if outcome.reason in HOPELESS:
        return Finding("job", "problem", words, "it would wait for ever: another --partition, --account or --time")
    return Finding("job", "warning", words, "so nothing is known of the compute nodes: try again with --wait MINUTES")


def _nothing_came_back(outcome: JobOutcome) -> Finding:
    words = f"job {outcome.job_id} ended as {outcome.state} ({outcome.reason})"
    if outcome.output:
        return Finding("job", "problem", f"{words}; the last it printed: {outcome.output}", _look_at(outcome))
    advice = (
        "the folder is not shared with the compute nodes, or they do not see it at the same path: clone the project "
        "onto a shared file system, or set CIFAR_HPC_ROOT"
    )
    return Finding("job", "problem", f"{words} and nothing of it can be seen in this folder", advice)


def _look_at(outcome: JobOutcome) -> str:
    if "No module named" in outcome.output:
        return "the compute nodes' Python lacks it: see python: and setup: in the site profile"
    if "command not found" in outcome.output:
        return "that program is not there on the compute nodes: see setup: (module load ...) in the site profile"
    return "see python: and setup: in the site profile; the whole output is kept"


def _ended(outcome: JobOutcome, tasks: Sequence[Task]) -> Finding:
    nodes = sorted({str(t.get("node")) for t in tasks})
    words = f"{len(tasks)} of {outcome.expected} tasks on {', '.join(nodes)}"
    failed = [t for t in tasks if t.get("error")]
    if failed:
        return Finding("job", "problem", f"{_who(failed[0])}: {failed[0]['error']}", "the whole output is kept")
    if len(tasks) < outcome.expected:
        return Finding("job", "problem", f"{words} came back: {outcome.output}", "the whole output is kept")
    return Finding("job", "ok", words)


def _shared(outcome: JobOutcome, tasks: Sequence[Task]) -> Finding:
    words = "what the login node wrote was read by the tasks, and the other way round; fsync and rename work there"
    return Finding("job file system", "ok", words)


def _locks(tasks: Sequence[Task]) -> Finding:
    blind = [t for t in tasks if not t.get("lock_seen")]
    if not blind:
        return Finding("job locks", "ok", "a lock held on the login node is seen on the compute nodes")
    words = blind[0].get("lock_error") or "a lock held on the login node is not seen there"
    advice = "Slurm alone keeps a run to one writer (--dependency=singleton): do not start a queued run by hand as well"
    return Finding("job locks", "warning", f"{_who(blind[0])}: {words}", advice)


def _python(tasks: Sequence[Task], here: Mapping[str, Any] | None) -> Finding:
    found = sorted({f"{t['python']} ({t['executable']})" for t in tasks})
    words = ", ".join(found)
    if len({t["python"] for t in tasks}) > 1:
        return Finding(
            "job python", "warning", f"not the same on all nodes: {words}", "name one in the profile: python:"
        )
    if here is not None and tasks[0]["python"] != here["python"]:
        advice = "works; but keep to one on the compute nodes, which decides about the bits"
        return Finding("job python", "ok", f"{words}; here {here['python']}", advice)
    return Finding("job python", "ok", words)


def _worst_packages(tasks: Sequence[Task], pins: Mapping[str, str]) -> Mapping[str, str | None]:
    """The packages of the task that fits the pins least."""

    def misfits(task: Task) -> int:
        found = task["packages"]
        return sum((found.get(n) is None) * 100 + (str(found.get(n)).partition("+")[0] != pins[n]) for n in pins)

    worst: Mapping[str, str | None] = max(tasks, key=misfits)["packages"]
    return worst


def _torch(tasks: Sequence[Task]) -> Finding:
    broken = [t for t in tasks if "error" in t["torch"]]
    if broken:
        return Finding(
            "job torch", "problem", f"{_who(broken[0])}: import torch: {broken[0]['torch']['error']}", _SETUP
        )
    slowest = max(t["torch"]["seconds"] for t in tasks)
    return Finding("job torch", "ok", f"torch {tasks[0]['torch']['version']}, imported in {slowest:.1f} s at most")


_SETUP = "see python: and setup: in the site profile"


def _gpus(tasks: Sequence[Task], spec: Spec) -> Finding:
    asked = 0 if spec.train.device == "cpu" else spec.resources.gpus_per_node
    if asked == 0:
        return Finding("job gpus", "ok", "none were asked for")
    blind = [t for t in tasks if not t["torch"].get("usable")]
    if blind:
        task = blind[0]
        count = f"{task['gpus']} GPU" + ("s" if task["gpus"] != 1 else "")
        given = f"Slurm gave {count} but CUDA is not usable" if task["gpus"] else "Slurm gave no GPU"
        built = task["torch"].get("built")
        why = (
            f"CUDA_VISIBLE_DEVICES={task['torch'].get('visible')}"
            if built
            else "this PyTorch is built for the CPU only"
        )
        advice = (
            "look at nvidia-smi on the node: driver, and in a container the option that lets GPUs in (--nv, --rocm); "
            "PyTorch must be built for a CUDA that the driver knows"
            if built
            else "install a PyTorch for CUDA or ROCm for the compute nodes"
        )
        return Finding("job gpus", "problem", f"{_who(task)}: {given} ({why})", advice)
    few = [t for t in tasks if t["gpus"] and t["gpus"] < asked]
    devices = sorted({name for t in tasks for name in t["torch"]["devices"]})
    words = f"{asked} on each node, usable by all tasks: {', '.join(devices)}"
    if few:
        found = f"{_who(few[0])}: {asked} were asked for, Slurm gave {few[0]['gpus']}"
        return Finding("job gpus", "problem", found, "see gpus: in the site profile")
    return Finding("job gpus", "ok", words)


def _data(tasks: Sequence[Task], spec: Spec, here: Mapping[str, Any] | None) -> Finding:
    without = [t for t in tasks if t["data"] is not None]
    if not without:
        return Finding("job data", "ok", f"{spec.data.source}: the nodes see the images")
    if here is None or here["data"] is not None:
        return Finding("job data", "warning", "not there on the nodes either")
    advice = "the folder of the images must be shared with the compute nodes: another data.root"
    return Finding("job data", "problem", f"{_who(without[0])}: {without_hint(without[0]['data'])}", advice)


def _all_reduce(tasks: Sequence[Task]) -> Finding:
    name = "job all-reduce"
    if len(tasks) == 1:
        return Finding(name, "ok", "one task: there is nothing to reduce; try --nodes 2 or --gpus-per-node 2")
    done = [t["all_reduce"] for t in tasks if "all_reduce" in t]
    advice = (
        "the nodes do not reach each other on the network that was picked: export NCCL_SOCKET_IFNAME=... and "
        "GLOO_SOCKET_IFNAME=... in the profile's setup: (ip link shows the names); NCCL_DEBUG=INFO tells more"
    )
    if len(done) < len(tasks) or not all(d["right"] for d in done):
        failed = next((t for t in tasks if t.get("error")), tasks[0])
        return Finding(name, "problem", f"{_who(failed)}: {failed.get('error', 'it did not add up')}", advice)
    seconds = max(d["seconds"] for d in done)
    words = (
        f"{done[0]['backend']} over {len(tasks)} tasks: the full model's gradients (19.6 MB) in {1e3 * seconds:,.0f} ms"
    )
    return Finding(name, "warning" if seconds > SLOW_SECONDS else "ok", words, advice if seconds > SLOW_SECONDS else "")


def _requeue(tasks: Sequence[Task], spec: Spec) -> Finding:
    task = tasks[0]
    if task["scontrol"] is None:
        advice = (
            "runs cannot requeue themselves at a preemption or time limit, and leave it to Slurm, which requeues only "
            "some. In a container: bind scontrol, its libraries, slurm.conf and munge's socket (docs/clusters.md)"
        )
        return Finding("job requeue", "warning", f"{_who(task)}: scontrol is not on PATH in the job", advice)
    if "scontrol_error" in task:
        return Finding("job requeue", "warning", str(task["scontrol_error"]), "runs ask Slurm what is going on with it")
    if task.get("requeue") != "1" and spec.resources.requeue:
        advice = "the site has taken --requeue away: after a preemption submit the run again by hand"
        return Finding("job requeue", "problem", f"scontrol says Requeue={task.get('requeue')}", advice)
    return Finding("job requeue", "ok", f"scontrol answers in the job: Requeue={task.get('requeue')}")


def _signals(tasks: Sequence[Task]) -> Finding:
    tried = [t for t in tasks if "signal" in t]
    if not any(t["rank"] == 0 for t in tried):  # which sends it
        return Finding("job signals", "warning", "not tried: the job did not come so far", "mend what stopped it first")
    if tried[0]["signal"] is None:
        return Finding("job signals", "warning", "not tried: scancel is not usable in the job")
    deaf = [t for t in tried if not t["signal"]]
    if not deaf:
        reached = "every task" if len(tried) == len(tasks) else "every task that came so far"
        return Finding("job signals", "ok", f"a signal of scancel reached {reached}")
    advice = (
        "a run would not hear a preemption, and lose what it did since its last checkpoint: what stands between srun "
        "and Python (a container, a wrapper in python:) must pass signals on; begin wrappers' last line with exec"
    )
    return Finding("job signals", "problem", f"{_who(deaf[0])} did not hear a signal of scancel", advice)


def _who(task: Task) -> str:
    return f"task {task['rank']} on {task['node']}"
