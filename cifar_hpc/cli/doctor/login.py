"""Checks on the login node: this machine (site profile, torch, images, file system) and Slurm. Never imports torch."""

import getpass
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_hpc.cli.doctor.node import Finding, Plan, hold_lock, is_locked, number, ok, problem, warning
from cifar_hpc.cli.submit import DEFAULT_JOB
from cifar_hpc.config.io import Site, from_plain, load_site, load_values
from cifar_hpc.config.spec import ResourcesSpec, Spec
from cifar_hpc.errors import SchedulerError, SpecError, UserError, explain, nearest
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.paths import PROJECT
from cifar_hpc.slurm import client
from cifar_hpc.slurm.options import NO_LIMIT, node_counts, parse_time
from cifar_hpc.text import counted

PROBE_SECONDS = 300
# On one machine's own disk or memory; a login node may of course export them to the others.
LOCAL_TYPES = {"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "squashfs"}
LOCAL_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/local"), Path("/localscratch"))
# Mount options under which other nodes do not see a lock: mount.lustre(8), nfs(5).
PRIVATE_LOCKS = {"localflock", "nolock", "local_lock=all", "local_lock=flock", "noflock"}
# The full model's weights, slow weights and momentum are 59 MB a checkpoint, of which a run keeps five or so.
WARNING_BYTES, PROBLEM_BYTES = 5e9, 5e8
# sinfo(1): nodes in these states take no jobs until somebody acts.
OUT = ("down", "drain", "drng", "fail", "maint", "unk", "inval")
_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "show")


def read_site(profile: str, flags: Mapping[str, Any]) -> tuple[Finding, Site, Spec]:
    """The site profile; and the spec of the default job there, which the other checks are about.

    Args:
        flags: values of the section `resources`, above the site's.
    """
    try:
        site, defaults = load_site(profile)
        spec = from_plain(load_values(DEFAULT_JOB, [], defaults, {"resources": flags}))
    except (UserError, OSError) as error:
        advice = "correct the profile or the flag; the rest is checked without them"
        return problem(explain(error)[0], advice), Site(), from_plain(load_values(DEFAULT_JOB))
    script = "\n".join([*site.setup, f"{site.python} -c pass" if site.python else "", ""])
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if wrong := syntax.stderr.strip():
        return problem(f"{profile}: setup or python is no valid shell code: {wrong}", "correct it"), site, spec
    python = site.python or f"{sys.executable} (this one)"
    return ok(f"{profile}: Python of the compute nodes: {python}"), site, spec


def plan_of(spec: Spec, root: Path) -> Plan:
    """Facts for the checks of other processes, which import torch, here and on the compute nodes."""
    file = PROJECT / "requirements.txt"
    pins = parse_requirements(file.read_text()) if file.exists() else {}
    gpus = 0 if spec.train.device == "cpu" else spec.resources.gpus
    data, python = spec.data, platform.python_version()
    return Plan(pins, data.source, str(root / data.root), gpus, spec.resources.requeue, python)


def parse_requirements(text: str) -> dict[str, str]:
    """{package: version} of the lines `package==version`."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s#;]+)", text, re.MULTILINE))


def check_torch(plan: Plan) -> list[Finding]:
    """Packages, torch and images, checked by a process of its own.

    Raises:
        SpecError: with the last line that the process printed.
    """
    command = [sys.executable, "-m", "cifar_hpc.cli.doctor.node", "--plan", json.dumps(asdict(plan))]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return [Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        raise SpecError(f"importing torch took more than {PROBE_SECONDS} s.") from None
    except (ValueError, IndexError):
        raise SpecError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]) from None


def mount_of(path: Path, mountinfo: str) -> tuple[str, str, set[str]]:
    """Mount point, kind and options of the file system that holds `path`, which must be absolute and resolved.

    Args:
        mountinfo: the text of /proc/self/mountinfo (proc(5)).
    """
    found: tuple[str, str, set[str]] = ("/", "unknown", set())
    line = re.compile(r"^(?:\S+ ){4}(\S+) (\S+) (?:\S+ )*?- (\S+) \S+ (\S+)", re.MULTILINE)
    for point, options, kind, more in line.findall(mountinfo):
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= len(found[0]):  # of two on one point the later one is seen
            found = (point, kind, {*options.split(","), *more.split(",")})
    return found


def check_file_system(folder: Path, alone: bool) -> Finding:
    """Writing, fsync and rename in the folder of checkpoints/ and logs/, and whether other machines can share it.

    Args:
        alone: there is no Slurm, so no other machine has to share it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch(folder) as scratch:
            for content in (b"before", b"after"):
                write_atomic(Path(scratch) / "a", content)
    except OSError as error:
        words = f"{folder}: writing, fsync or rename failed: {error.strerror or error}"
        return problem(words, "set CIFAR_HPC_ROOT to a folder that you can write and that the compute nodes share")
    point, kind, _ = mount_of(folder, _mountinfo())
    words = f"{folder} ({kind} on {point}): writing, fsync and rename work"
    if alone or not (kind in LOCAL_TYPES or any(folder.is_relative_to(p) for p in LOCAL_FOLDERS)):
        return ok(words)
    advice = "compute nodes must see the same folder; --job finds out. Else clone elsewhere, or set CIFAR_HPC_ROOT"
    return warning(f"{words}, but this may be this machine's own disk", advice)


def check_locks(folder: Path) -> Finding:
    """Locks (flock), which keep a run to one writer."""
    advice = "only Slurm keeps a run to one writer then: do not start it by hand or with --cluster local as well"
    if private := mount_of(folder, _mountinfo())[2] & PRIVATE_LOCKS:
        return warning(f"mounted with {', '.join(sorted(private))}: other nodes see no locks", advice)
    try:
        with _scratch(folder) as scratch, hold_lock(Path(scratch) / "lock"):
            if is_locked(Path(scratch) / "lock"):
                return ok("flock works")
    except OSError as error:
        return warning(f"flock does not work here: {error.strerror}", advice)
    return warning("a lock (flock) that is held does not keep others out", advice)


def check_free_space(folder: Path) -> Finding:
    """Room for checkpoints."""
    free = shutil.disk_usage(folder).free
    words = f"{free / 1e9:,.1f} GB free (a quota of yours is not seen here)"
    if free >= WARNING_BYTES:
        return ok(words)
    advice = "a run of the full model keeps about 0.3 GB of checkpoints; make room, or set CIFAR_HPC_ROOT"
    return problem(words, advice) if free < PROBLEM_BYTES else warning(words, advice)


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True)


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:  # not Linux
        return ""


class SlurmChecks:
    """Checks of a job with these resources. Each may raise SchedulerError."""

    def __init__(self, resources: ResourcesSpec) -> None:
        self.resources = resources

    @cached_property
    def config(self) -> Mapping[str, str]:
        """`scontrol show config`."""
        return client.config()

    @cached_property
    def partitions(self) -> Mapping[str, Mapping[str, str]]:
        """`scontrol show partition`, by the partition's name."""
        lines = client.command(["scontrol", "show", "partition", "-o"]).splitlines()
        found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
        return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}

    @property
    def partition(self) -> Mapping[str, str]:
        """The named partition (of several the first), or the default one; empty where there is neither."""
        if self.resources.partition is not None:
            return self.partitions.get(self.resources.partition.split(",")[0], {})
        return next((p for p in self.partitions.values() if p.get("Default") == "YES"), {})

    def check_slurm(self) -> Finding:
        """An answer from Slurm's controller."""
        try:
            if not client.answers():
                advice = "on a cluster: is this a login node, is Slurm's module loaded? Without one: --cluster local"
                return warning("no Slurm here: only this machine is looked at", advice)
            version, _ = client.command(["scontrol", "--version"]).strip(), self.partitions
            return ok(f"{version}, cluster {self.config.get('ClusterName', '?')}")
        except SchedulerError as error:
            advice = "try again; `scontrol ping` and your site's status page tell more. Without Slurm: --cluster local"
            return problem(str(error), advice)

    def check_partition(self) -> Finding:
        """The partition: it exists, is up, and allows the time limit."""
        names = ", ".join(sorted(self.partitions)) or "none that you may see"
        for asked in (self.resources.partition or "").split(","):
            if asked and asked not in self.partitions:
                hint = nearest(asked, self.partitions).removeprefix(" HINT: ")
                return problem(f"{asked} is not there; there are: {names}", hint)
        if not (fields := self.partition):
            words = f"no partition is named: this site's router has to choose one; there are: {names}"
            return warning(words, "or name one: --partition")
        name = fields["PartitionName"] + (" (the default)" if self.resources.partition is None else "")
        nodes = counted(int(fields.get("TotalNodes", 0)), "node")
        words = f"{name}: {fields.get('State')}, {nodes}, up to {fields.get('MaxTime')}"
        if fields.get("State") != "UP":
            return problem(words, "it starts no jobs now; see sinfo, or another --partition")
        if 0 < _seconds(fields.get("MaxTime", "")) < parse_time(self.resources.time):
            words += f"; --time {self.resources.time} is more"
            return problem(words, "a smaller --time; runs are requeued and go on")
        return ok(words)

    def check_nodes(self) -> Finding:
        """Nodes in service, compared with the nodes and GPUs that are asked for."""
        name, wanted = self.partition["PartitionName"], self.resources.gpus
        nodes: Counter[int] = Counter()  # by their number of GPUs; -1: out of service
        for count, state, gres in _table("sinfo", "--noheader", f"--partition={name}", "--format=%D|%t|%G"):
            nodes[-1 if state.startswith(OUT) else gpus_of(gres)] += int(count)
        out = nodes.pop(-1, 0)
        words = (
            ", ".join(f"{count} with {counted(gpus, 'GPU')}" for gpus, count in sorted(nodes.items(), reverse=True))
            or "none"
        )
        words = f"in service: {words}" + (f"; {out} out of service" if out else "")
        if not nodes:
            return problem(words, "see sinfo -R for the reasons; another --partition")
        if sum(nodes[gpus] for gpus in nodes if gpus >= wanted) < node_counts(self.resources.nodes)[0]:
            words = f"{words}; asked for: {self.resources.nodes} with {counted(wanted, 'GPU')} each"
            return problem(words, "fewer --nodes or --gpus-per-node, another --partition")
        return ok(words)

    def check_preemption(self) -> Finding:
        """Preemption: by which jobs, and with how much warning."""
        kind = self.config.get("PreemptType", "").rpartition("/")[2]
        if kind == "qos":
            return self._preemption_by_qos()
        mode = self.partition.get("PreemptMode", "OFF").upper()
        if kind != "partition_prio" or mode == "OFF":
            return ok("jobs of this partition are not preempted")
        tier, own = number(self.partition.get("PriorityTier")), _node_names(self.partition)
        higher = {name: p for name, p in self.partitions.items() if number(p.get("PriorityTier")) > tier}
        if not (stronger := sorted(name for name, fields in higher.items() if own & _node_names(fields))):
            return ok("no partition over the same nodes has a higher PriorityTier")
        return self._preempted(", ".join(stronger), mode, number(self.partition.get("GraceTime")))

    def _preemption_by_qos(self) -> Finding:
        """Preemption by QOS, which ignores the mode and grace time of the partition."""
        qos, usual = self.resources.qos, self.config.get("PreemptMode", "OFF").upper()
        if qos is None:
            words = f"the job's QOS decides by whom and how jobs are preempted (here PreemptMode={usual})"
            return ok(f"{words}; none is named", "sacctmgr show qos format=name,preempt,preemptmode,gracetime")
        rows = _table(*_SACCTMGR, "qos", "format=Name,Preempt,PreemptMode,GraceTime")
        own, grace = next(((mode.upper(), grace) for name, _, mode, grace in rows if name == qos), ("", ""))
        # OFF and CLUSTER mean the mode of the whole cluster: sacctmgr(1).
        mode = usual if own in ("", "OFF", "CLUSTER") else own
        by = {row[0] for row in rows if qos in row[1].split(",") or (row[0] == qos and "WITHIN" in mode)}
        if not by:
            return ok(f"no QOS may preempt {qos}")
        return self._preempted(f"the QOS {', '.join(sorted(by))}", mode, _seconds(grace))

    def _preempted(self, by: str, mode: str, grace: int) -> Finding:
        if "SUSPEND" in mode or mode == "GANG":
            advice = "a suspended run pauses and goes on later; its log is silent meanwhile"
            return warning(f"suspended by jobs of {by} (PreemptMode={mode})", advice)
        words = f"preempted by jobs of {by} (PreemptMode={mode}): "
        if grace:
            return ok(f"{words}SIGTERM, {grace} s of grace; a run saves and requeues itself")
        words += f"no grace: SIGTERM, SIGKILL {self.config.get('KillWait', '?')} later"
        advice = "a preempted job is gone, and a run has no time to requeue itself: submit it again to go on"
        return warning(words, advice) if "CANCEL" in mode else ok(words)

    def check_requeue(self) -> Finding:
        """Requeueing, as the profile asks for it; only a job can find out if the site allows it."""
        if not self.resources.requeue:
            advice = "preempted runs stay away until they are submitted again: resources.requeue: true"
            return warning("the profile turns requeueing off", advice)
        default = "by default" if self.config.get("JobRequeue") == "1" else "only where a job asks for it"
        return ok(f"Slurm requeues jobs {default} (JobRequeue); runs ask for it (--requeue)")

    def check_account(self) -> Finding:
        """Account and QOS, compared with those that accounting has for this user."""
        if not self.config.get("AccountingStorageType", "").endswith("slurmdbd"):
            return ok("no accounting here: accounts and QOS are not checked by Slurm")
        user, account, qos = getpass.getuser(), self.resources.account, self.resources.qos
        rows = _table(*_SACCTMGR, "assoc", f"user={user}", "format=Account,Partition,QOS")
        accounts = sorted({row[0] for row in rows})
        if not accounts:
            return warning(f"none of {user} is known", "ask your site if sbatch refuses")
        words = f"yours: {', '.join(accounts)}" + (f"; asked for: {account}" if account else "")
        if account is not None and account.lower() not in accounts:
            return problem(words, "--account with one of yours, also in the profile")
        allowed = sorted({name for row in rows for name in row[2].split(",") if name and account in (None, row[0])})
        if qos is not None and allowed and qos not in allowed:
            advice = "--qos with one of yours, also in the profile"
            return problem(f"QOS {qos} is not among yours: {', '.join(allowed)}", advice)
        if account is None and len(accounts) > 1:
            return ok(words, "without --account the default one is charged; some sites refuse")
        return ok(words)


def gpus_of(gres: str) -> int:
    """GPUs in sinfo's %G, such as gpu:a100:4(S:0-1),nvme:900 or (null)."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^,:()]+)?:([0-9]+)", gres))


def _table(*command: str) -> list[list[str]]:
    """The rows that a command prints, with its columns separated by bars."""
    return [line.split("|") for line in client.command(command).splitlines() if "|" in line]


def _node_names(partition: Mapping[str, str]) -> set[str]:
    return set(client.command(["scontrol", "show", "hostnames", partition.get("Nodes", "")]).split())


def _seconds(text: str) -> int:
    """Seconds of a time of Slurm's; 0 where it is none, such as UNLIMITED."""
    try:
        return parse_time(text) % NO_LIMIT
    except SpecError:
        return 0
