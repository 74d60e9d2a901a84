"""Doctor's questions to Slurm: does it answer, what is the partition, what preempts there, who may submit."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cifar_hpc.cli.doctor.doctor_report import Finding
from cifar_hpc.config.spec import ResourcesSpec
from cifar_hpc.errors import SchedulerError, SpecError, nearest
from cifar_hpc.slurm import client as slurm
from cifar_hpc.slurm.options import parse_time

Partition = Mapping[str, str]
WITHOUT = "no partition is named: this site's router has to choose one"
# sinfo(1): nodes in these states take no jobs until somebody acts.
OUT = ("down", "drain", "drng", "fail", "maint", "unk", "inval")


@dataclass
class Cluster:
    """What Slurm says of itself."""

    version: str
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[str, Partition] = field(default_factory=dict)

    def partition(self, name: str | None) -> Partition | None:
        """The named partition (of several the first), or the default one; None where there is neither."""
        if name is not None:
            return self.partitions.get(name.split(",")[0])
        return next((p for p in self.partitions.values() if p.get("Default") == "YES"), None)


def check_slurm() -> tuple[Finding, Cluster | None]:
    """Whether Slurm is here and its controller answers; None where the rest cannot be asked."""
    try:
        if not slurm.answers():
            advice = "on a cluster: is this a login node, is Slurm's module loaded? Without one: --cluster local"
            return Finding("slurm", "warning", "no Slurm here: only this machine is looked at", advice), None
        version = slurm.command(["scontrol", "--version"]).strip()
        config = parse_config(slurm.command(["scontrol", "show", "config"]))
        partitions = parse_partitions(slurm.command(["scontrol", "show", "partition", "-o"]))
    except SchedulerError as error:
        advice = "try again; `scontrol ping` and your site's status page tell more. Without Slurm: --cluster local"
        return Finding("slurm", "problem", str(error), advice), None
    name = config.get("ClusterName", "?")
    return Finding("slurm", "ok", f"{version}, cluster {name}"), Cluster(version, config, partitions)


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` as {key: value}."""
    return {key: value.strip() for key, value in re.findall(r"^(\w+)\s*= ?(.*)$", text, re.MULTILINE)}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """`scontrol show partition -o` as {name: {key: value}}."""
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def check_partition(cluster: Cluster, resources: ResourcesSpec) -> Finding:
    """Whether jobs can go to the partition as they are asked for."""
    names = ", ".join(sorted(cluster.partitions)) or "none that you may see"
    for asked in (resources.partition or "").split(","):
        if asked and asked not in cluster.partitions:
            hint = nearest(asked, cluster.partitions).removeprefix(" HINT: ")
            return Finding("partition", "problem", f"{asked} is not there; there are: {names}", hint)
    partition = cluster.partition(resources.partition)
    if partition is None:
        return Finding("partition", "warning", f"{WITHOUT}; there are: {names}", "or name one: --partition")
    name = partition["PartitionName"] + (" (the default)" if resources.partition is None else "")
    words = f"{name}: {partition.get('State')}, {partition.get('TotalNodes')} nodes, up to {partition.get('MaxTime')}"
    if partition.get("State") != "UP":
        return Finding("partition", "problem", words, "it starts no jobs now; see sinfo, or another --partition")
    if wrong := _too_long(partition, resources):
        return Finding("partition", "problem", f"{words}; {wrong}", "a smaller --time; runs are requeued and go on")
    return Finding("partition", "ok", words)


def _too_long(partition: Partition, resources: ResourcesSpec) -> str:
    try:
        limit = parse_time(partition.get("MaxTime", ""))
    except SpecError:  # UNLIMITED
        return ""
    return f"--time {resources.time} is more" if parse_time(resources.time) > limit else ""


def check_nodes(partition: Partition, resources: ResourcesSpec) -> Finding:
    """Whether the partition has nodes in service with as many GPUs as are asked for."""
    try:
        text = slurm.command(["sinfo", "--noheader", f"--partition={partition['PartitionName']}", "--format=%D|%t|%G"])
    except SchedulerError as error:
        return Finding("nodes", "warning", str(error))
    return judge_nodes([line.split("|", 2) for line in text.splitlines() if line.count("|") >= 2], resources)


def judge_nodes(rows: Sequence[Sequence[str]], resources: ResourcesSpec) -> Finding:
    """As `check_nodes`.

    Args:
        rows: (number of nodes, state, gres) as sinfo prints them.
    """
    groups = [(int(count), gpus_of(gres)) for count, state, gres in rows if not state.startswith(OUT)]
    out = sum(int(count) for count, state, _ in rows if state.startswith(OUT))
    words = ", ".join(f"{count} with {gpus} GPUs" for count, gpus in _joined(groups)) or "none"
    words = f"in service: {words}" + (f"; {out} out of service" if out else "")
    if not groups:
        return Finding("nodes", "problem", words, "see sinfo -R for the reasons; another --partition")
    fitting = sum(count for count, gpus in groups if gpus >= resources.gpus_per_node)
    if fitting < int(resources.nodes.split("-")[0]):
        asked = f"{resources.nodes} nodes with {resources.gpus_per_node} GPUs each are asked for"
        return Finding("nodes", "problem", f"{words}; {asked}", "fewer --nodes or --gpus-per-node, another --partition")
    return Finding("nodes", "ok", words)


def gpus_of(gres: str) -> int:
    """GPUs in sinfo's %G, such as gpu:a100:4(S:0-1),nvme:900 or (null)."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^,:()]+)?:([0-9]+)", gres))


def _joined(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    totals: dict[int, int] = {}
    for count, gpus in groups:
        totals[gpus] = totals.get(gpus, 0) + count
    return [(count, gpus) for gpus, count in sorted(totals.items(), reverse=True)]


def check_preemption(cluster: Cluster, partition: Partition, resources: ResourcesSpec) -> Finding:
    """What happens to a job here that others may preempt."""
    kind = cluster.config.get("PreemptType", "").rpartition("/")[2]
    if kind == "qos":
        query = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,Preempt,PreemptMode,GraceTime"]
        try:
            text = slurm.command(query)
        except SchedulerError as error:
            return Finding("preemption", "warning", str(error), "a QOS decides here whether and how a job is preempted")
        rows = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
        return judge_qos(rows, resources.qos, cluster)
    mode = partition.get("PreemptMode", "OFF").upper()
    if kind in ("", "none", "(null)") or mode == "OFF":
        return Finding("preemption", "ok", "jobs of this partition are not preempted")
    by = ""
    if kind == "partition_prio":
        above = stronger(cluster.partitions, partition)
        if not above:
            return Finding("preemption", "ok", "no partition over the same nodes has a higher PriorityTier")
        by = f" by jobs of {', '.join(above)}"
    return _preempted(by, mode, _number(partition.get("GraceTime")), cluster)


def judge_qos(rows: Sequence[Sequence[str]], qos: str | None, cluster: Cluster) -> Finding:
    """As `check_preemption`, where a QOS decides: the partition's mode and grace time count for nothing then.

    Args:
        rows: (name, the QOS whose jobs its own may preempt, mode, grace time) as sacctmgr prints them.
        qos: the one that is asked for.
    """
    usual = cluster.config.get("PreemptMode", "OFF").upper()
    if qos is None:
        words = f"the job's QOS decides by whom and how jobs are preempted (here PreemptMode={usual}); none is named"
        return Finding("preemption", "ok", words, "sacctmgr show qos format=name,preempt,preemptmode,gracetime")
    own, grace = next(((row[2].upper(), row[3]) for row in rows if row[0] == qos), ("", ""))
    # OFF and CLUSTER stand for the mode of the whole cluster: sacctmgr(1).
    mode = usual if own in ("", "OFF", "CLUSTER") else own
    by = sorted(name for name, preempts, *_ in rows if qos in preempts.split(",") or (name == qos and "WITHIN" in mode))
    if not by:
        return Finding("preemption", "ok", f"no QOS may preempt {qos}")
    return _preempted(f" by jobs of the QOS {', '.join(by)}", mode, _seconds(grace), cluster)


def _seconds(text: str) -> int:
    try:
        return parse_time(text)
    except SpecError:
        return 0


def _preempted(by: str, mode: str, grace: int, cluster: Cluster) -> Finding:
    if "SUSPEND" in mode or mode == "GANG":
        advice = "a suspended run stands still and goes on later; its log is silent meanwhile"
        return Finding("preemption", "warning", f"suspended{by} (PreemptMode={mode})", advice)
    kill = cluster.config.get("KillWait", "?")
    warned = f"SIGTERM, {grace} s of grace" if grace else f"no grace: SIGTERM, SIGKILL {kill} later"
    words = f"preempted{by} (PreemptMode={mode}): {warned}"
    if "CANCEL" in mode and not grace:
        advice = "a preempted job is gone, and a run has no time to requeue itself: submit it again to go on"
        return Finding("preemption", "warning", words, advice)
    return Finding("preemption", "ok", f"{words}; a run saves and requeues itself" if grace else words)


def stronger(partitions: Mapping[str, Partition], partition: Partition) -> list[str]:
    """Partitions with a higher PriorityTier that share nodes with `partition`, as far as their lists tell."""
    tier = _number(partition.get("PriorityTier"))
    names = set(_node_names(partition.get("Nodes", "")))
    return sorted(
        name
        for name, other in partitions.items()
        if _number(other.get("PriorityTier")) > tier and names & set(_node_names(other.get("Nodes", "")))
    )


def _node_names(text: str) -> list[str]:
    """The nodes of a list such as a[1-3,7],b2: its numbers written out; a list with two brackets in a name as it is."""
    names: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text)[:10_000]:
        match = re.fullmatch(r"([^\[]*)\[([0-9,-]+)\]([^\[]*)", item)
        if match is None:
            names.append(item)
            continue
        for part in match.group(2).split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), min(int(last or first), int(first) + 100_000) + 1)
            names += [f"{match.group(1)}{number:0{len(first)}}{match.group(3)}" for number in numbers]
    return names


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def check_requeue(cluster: Cluster, resources: ResourcesSpec) -> Finding:
    """Whether jobs ask to be requeued; whether they are allowed to, only a job can tell."""
    default = "by default" if cluster.config.get("JobRequeue") == "1" else "only where a job asks for it"
    if not resources.requeue:
        advice = "preempted runs stay away until they are submitted again: resources.requeue: true"
        return Finding("requeue", "warning", "the profile turns requeueing off", advice)
    return Finding("requeue", "ok", f"Slurm requeues jobs {default} (JobRequeue); runs ask for it (--requeue)")


def check_account(cluster: Cluster, resources: ResourcesSpec) -> Finding:
    """Whether account and QOS are among those that accounting has for this user."""
    if not cluster.config.get("AccountingStorageType", "").endswith("slurmdbd"):
        return Finding("account", "ok", "no accounting here: accounts and QOS are not checked by Slurm")
    user = _user()
    query = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=Account,Partition,QOS"]
    try:
        text = slurm.command(query)
    except SchedulerError as error:
        return Finding("account", "warning", str(error), "runs do without accounting; sbatch will tell")
    return judge_account([line.split("|", 2) for line in text.splitlines() if line.count("|") >= 2], user, resources)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a number without a name
        return str(os.getuid())


def judge_account(rows: Sequence[Sequence[str]], user: str, resources: ResourcesSpec) -> Finding:
    """As `check_account`.

    Args:
        rows: (account, partition, QOS) as sacctmgr prints them.
    """
    accounts = sorted({row[0] for row in rows})
    if not accounts:
        return Finding("account", "warning", f"none of {user} is known", "ask your site if sbatch refuses")
    words = f"yours: {', '.join(accounts)}" + (f"; asked for: {resources.account}" if resources.account else "")
    if resources.account is not None and resources.account.lower() not in accounts:
        return Finding("account", "problem", words, "--account with one of yours, also in the profile")
    qos = sorted({name for row in rows for name in row[2].split(",") if name and resources.account in (None, row[0])})
    if resources.qos is not None and qos and resources.qos not in qos:
        found = f"QOS {resources.qos} is not among yours: {', '.join(qos)}"
        return Finding("account", "problem", found, "--qos with one of yours, also in the profile")
    if resources.account is None and len(accounts) > 1:
        advice = "without --account the default one is charged; some sites refuse"
        return Finding("account", "ok", words, advice)
    return Finding("account", "ok", words)
