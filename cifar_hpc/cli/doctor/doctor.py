"""python -m cifar_hpc doctor: problems that runs would meet here, and what to do about them.

Each line is ok, a warning or a problem, with what was found and what to do.
Without --job nothing is submitted.

--job submits one small job the way runs are submitted, and checks in every
task: Python and packages, GPUs, file system and locks, images, all-reduce
between the tasks (NCCL or gloo), requeueing, signals. It leaves nothing
behind, unless there is a problem: then what the job printed is kept. Ctrl-C
cancels it.

Exit status: 0 no problem (warnings are none), 1 a problem, 2 bad arguments.
--json prints a list of {check, status, found, advice}.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from cifar_hpc.cli.doctor import login, node
from cifar_hpc.cli.doctor.node import STATUSES, Finding, Plan, TaskReport, ok, problem, run_check, warning
from cifar_hpc.cli.terminal import paint, use_colour
from cifar_hpc.config.io import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.files import write_atomic
from cifar_hpc.launch import batch_script
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs.paths import RunPaths, project_root
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.slurm import client
from cifar_hpc.text import counted, one_line, printable

EXAMPLES = (
    "",
    "--profile mycluster --account lab --job",
    "--partition gpu --job --nodes 2 --gpus-per-node 4 --wait 60",
)

NEEDED_ON_NODES = ("torch", "torchvision", "submitit", "pyyaml", "numpy")  # the others draw, export and show
COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
TIME_LIMIT = "5"  # minutes; it takes one, most of it for importing torch
POLL_SECONDS = 1.0
ENDING_SECONDS = 60.0
NETWORK = (
    "the nodes do not reach each other on the network that was picked: export NCCL_SOCKET_IFNAME=... and "
    "GLOO_SOCKET_IFNAME=... in the profile's setup: (ip link shows the names); NCCL_DEBUG=INFO tells more"
)
# With these a job waits until somebody changes it or the partition (squeue(1), JOB REASON CODES).
HOPELESS = (
    "AccountNotAllowed", "BadConstraints", "InvalidAccount", "InvalidQOS", "JobHeldAdmin", "PartitionConfig",
    "PartitionDown", "PartitionInactive", "PartitionNodeLimit", "PartitionTimeLimit", "QOSNotAllowed",
)  # fmt: skip
# Checks of the login node, and the finding of the job that takes a warning of theirs back.
TAKEN_BACK = {"file system": "job file system", "locks": "job locks", "torch": "job torch"}
TAKEN_BACK |= dict.fromkeys(("partition", "nodes", "account"), "job")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="NAME", default="default", help="the site in slurm/clusters")
    parser.add_argument("--partition", metavar="P", help="the partition that runs would go to")
    parser.add_argument("--account", metavar="A", help="the account that runs would be charged to")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="on so many nodes (default: 1)")
    parser.add_argument("--gpus-per-node", metavar="G", help="GPUs on each (default: the site's, else 1)")
    parser.add_argument("--job", action="store_true", help="look on the compute nodes as well, in a job of a minute")
    words = "how long that job may wait for its start (default: 10)"
    parser.add_argument("--wait", type=float, metavar="MINUTES", help=words)
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Check this machine, Slurm and, with --job, the compute nodes; returns 1 where there is a problem."""
    if arguments.wait is not None and not arguments.job:
        raise SpecError("--wait: is how long the job of --job may wait. HINT: add --job.")
    return show(_findings(arguments), arguments.json)


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    """All findings, one after the other."""
    root = project_root()
    flags = {key: getattr(arguments, key) for key in ("partition", "account", "gpus_per_node", "nodes")}
    profile, site, spec = login.read_site(arguments.profile, {k: v for k, v in flags.items() if v is not None})
    plan = login.plan_of(spec, root)
    yield from run_check("python", node.check_python, plan)
    yield replace(profile, check="site")
    cluster = login.SlurmChecks(spec.resources)
    (answer,) = run_check("slurm", cluster.check_slurm)
    yield answer
    if has_slurm := answer.status == "ok":
        on_nodes = {"nodes": cluster.check_nodes, "preemption": cluster.check_preemption} if cluster.partition else {}
        checks = {"partition": cluster.check_partition, **on_nodes, "requeue": cluster.check_requeue}
        for name, check in (checks | {"account": cluster.check_account}).items():
            yield from run_check(name, check)
    (folder,) = run_check("file system", login.check_file_system, root, not has_slurm)
    yield folder
    if folder.status != "problem":
        yield from run_check("locks", login.check_locks, root)
        yield from run_check("free space", login.check_free_space, root)
    yield from (torch := run_check("torch", login.check_torch, plan))
    if arguments.job and has_slurm:
        plan = replace(plan, data_here=any(f.check == "data" and f.status == "ok" for f in torch))
        yield from run_check(
            "job", check_job, root, spec, site, plan, 60 * (10 if arguments.wait is None else arguments.wait)
        )
    elif arguments.job:
        yield Finding("job", "warning", "--job needs a Slurm that answers", "try again on a login node")


def check_job(root: Path, spec: Spec, site: Site, plan: Plan, patience: float) -> Iterator[Finding]:
    """Run the job; yields the findings of its tasks. What it printed is kept where there is a problem.

    Args:
        patience: seconds that the job may wait for its start.
    """
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=logs, ignore_cleanup_errors=True) as folder:
        paths = RunPaths(root, Path(folder).name)
        paths.slurm.mkdir()
        tasks = spec.resources.max_nodes * spec.resources.ntasks_per_node
        try:
            with node.hold_lock(paths.logs / node.LOCK):
                job_id = _submit(paths, spec, site, plan)
                nodes = counted(spec.resources.max_nodes, "node")
                say(f"job {job_id}: {counted(tasks, 'task')} on {nodes}; Ctrl-C cancels it")
                state, reason = _wait(job_id, patience)
        except SchedulerError as error:
            yield problem(str(error), "--partition, --account and the profile's resources are what sites ask for")
            return
        output, ended = _last_lines(paths.slurm), f"job {job_id} ended as {state} ({reason})"
        findings = [not_started(job_id, reason)]
        if state != "PENDING":
            findings = job_findings(ended, tasks, _task_reports(paths.logs), output)
        yield from findings
        if output and any(finding.status == "problem" for finding in findings):
            kept = shutil.copytree(paths.slurm, f"{folder}-kept/slurm")
            say(f"what the job printed is kept in {kept}")


def _submit(paths: RunPaths, spec: Spec, site: Site, plan: Plan) -> str:
    plan = replace(plan, pins={name: pin for name, pin in plan.pins.items() if name in NEEDED_ON_NODES})
    write_atomic(paths.logs / node.PLAN, json.dumps(asdict(plan)).encode())
    spec = replace(spec, resources=replace(spec.resources, time=TIME_LIMIT))
    script = batch_script.module_script(paths, spec, site, ["cifar_hpc.cli.doctor.node", str(paths.logs)])
    with contextlib.chdir(take_snapshot(paths)):
        return batch_script.sbatch("--parsable", script).partition(";")[0]


def _wait(job_id: str, patience: float) -> tuple[str, str]:
    """Wait until the job has ended, or will not start; returns its state and the reason. An interrupt cancels it."""
    begin, said = time.monotonic(), ""
    try:
        while True:
            fields = client.job_fields(job_id)
            state, reason = fields.get("JobState", "?"), fields.get("Reason", "?")
            if state not in (*ALIVE, "PENDING", "CONFIGURING", "COMPLETING", "SUSPENDED"):
                return state, reason
            if state == "PENDING" and (reason in HOPELESS or time.monotonic() - begin > patience):
                _cancel(job_id)
                return state, reason
            words = f"{state.lower()} on {fields.get('NodeList', '?')}"
            if state == "PENDING":
                words = "queued" if reason == "None" else f"queued ({reason})"
            if words != said:
                say(f"job {job_id}: {words}")
                said = words
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(job_id)
        say(f"job {job_id}: cancelled")
        raise


def _cancel(job_id: str) -> None:
    """Cancel the job and wait until its processes have stopped writing."""
    with contextlib.suppress(SchedulerError):
        client.cancel_job(job_id)
        end = time.monotonic() + ENDING_SECONDS
        while client.job_fields(job_id).get("JobState") in (*ALIVE, "COMPLETING") and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 5)


def _task_reports(folder: Path) -> list[TaskReport]:
    # Lists the folder, so that an NFS client does not trust its cache.
    reports = [TaskReport(**json.loads(path.read_text())) for path in folder.glob("task-*.json")]
    return sorted(reports, key=lambda report: report.rank)


def _last_lines(folder: Path) -> str:
    """The last lines that rank 0, or else another task, has printed."""
    for path in sorted(folder.glob("*_log.out")):
        if lines := [line for line in path.read_text(errors="replace").splitlines() if line.strip()]:
            return " / ".join(lines[-3:])
    return ""


def not_started(job_id: str, reason: str) -> Finding:
    """A job that Slurm did not start in time."""
    words = f"job {job_id} did not start: {reason}; it is cancelled"
    if reason in HOPELESS:
        return problem(words, "it would wait for ever: another --partition, --account or --time")
    return warning(words, "so nothing is known of the compute nodes: try again with --wait MINUTES")


def job_findings(ended: str, expected: int, tasks: Sequence[TaskReport], output: str) -> list[Finding]:
    """The findings of all tasks together: of each check the worst.

    Args:
        ended: a sentence about the job's end.
        expected: the number of tasks.
        tasks: the reports that came back, by rank.
        output: the last lines of what the job printed.
    """
    if not tasks and output:
        advice = "see python: and setup: (module load ...) in the site profile; the whole output is kept"
        return [problem(f"{ended}; the last it printed: {output}", advice)]
    if not tasks:
        advice = "clone the project to where the nodes see it at the same path as here, or set CIFAR_HPC_ROOT"
        return [problem(f"{ended} and nothing of it can be seen in this folder", advice)]
    words = f"{len(tasks)} of {expected} tasks on {', '.join(sorted({task.node for task in tasks}))}"
    findings = [ok(words)]
    if killed := [task for task in tasks if not task.finished]:
        findings = [problem(f"{_who(killed[0])} ended too early: {output}", node.KEPT)]
    elif len(tasks) < expected:
        findings = [problem(f"{words} came back: {output}", node.KEPT)]
    words = "what the login node wrote was read by the tasks, and the other way round; fsync and rename work there"
    findings.append(replace(ok(words), check="job file system"))
    for check in dict.fromkeys(finding.check for task in tasks for finding in task.findings):
        findings.append(_worst([(task, f) for task in tasks for f in task.findings if f.check == check]))
    return findings


def _worst(found: Sequence[tuple[TaskReport, Finding]]) -> Finding:
    """The worst of the tasks' findings of one check; of equals the first."""
    task, worst = max(found, key=lambda pair: STATUSES.index(pair[1].status))
    pythons = sorted({finding.found for _, finding in found if finding.check == "python"})
    if worst.status != "ok":
        advice = NETWORK if worst.check == "all-reduce" else worst.advice
        worst = replace(worst, found=f"{_who(task)}: {worst.found}", advice=advice)
    elif len({words.split()[0] for words in pythons}) > 1:
        worst = warning(f"not the same on all nodes: {', '.join(pythons)}", "name one in the profile: python:")
    return replace(worst, check=f"job {found[0][1].check}")


def _who(task: TaskReport) -> str:
    return f"task {task.rank} on {task.node}"


def say(words: str) -> None:
    """Print a line about progress on stderr, for people who wait; it is not part of the answer."""
    print(printable(words), file=sys.stderr, flush=True)


def show(findings: Iterable[Finding], as_json: bool) -> int:
    """Print each finding as soon as it is there, or all as JSON; returns 1 where there is a problem."""
    found: dict[str, Finding] = {}
    for finding in chain(findings, _taken_back(found)):  # of one check the last counts
        found[finding.check] = finding
        if not as_json:
            print(as_text(finding), flush=True)
    good, warnings, problems = (sum(finding.status == status for finding in found.values()) for status in STATUSES)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found.values()], indent=1))
    else:
        print(f"\n{good} ok, {counted(warnings, 'warning')}, {counted(problems, 'problem')}")
    return 1 if problems else 0


def _taken_back(found: Mapping[str, Finding]) -> Iterator[Finding]:
    """The warnings that the job has disproved, as ok."""
    for check, by in TAKEN_BACK.items():
        if all(name in found and found[name].status == status for name, status in ((check, "warning"), (by, "ok"))):
            yield Finding(check, "ok", f"the warning is taken back: {found[by].found}")


def as_text(finding: Finding) -> str:
    """One line, and the advice below it; folded and coloured on a terminal only, so that grep finds whole lines."""
    indent = " " * len("problem  job file system  ")
    width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    lines = [f"{finding.status:7}  {finding.check:15}  {one_line(finding.found)}"]
    lines += [f"{indent}-> {one_line(finding.advice)}"] if finding.advice else []
    text = "\n".join(map(wrap.fill, lines))
    style = COLOURS[finding.status] if use_colour(sys.stdout) else ""
    return paint(finding.status, style) + text[len(finding.status) :]
