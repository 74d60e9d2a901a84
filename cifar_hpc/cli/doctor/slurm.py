"""Checks of Slurm: its controller, the partition and its nodes, preemption, requeueing, accounts."""

from __future__ import annotations

import os
import pwd
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from cifar_hpc.cli.doctor.report import Finding, ok, problem, warning
from cifar_hpc.config.spec import ResourcesSpec
from cifar_hpc.errors import SchedulerError, SpecError, nearest
from cifar_hpc.slurm import client as slurm
from cifar_hpc.slurm.options import parse_time

# sinfo(1): nodes in these states take no jobs until somebody acts.
OUT = ("down", "drain", "drng", "fail", "maint", "unk", "inval")


class SlurmChecks:
    """Checks of a job with these resources. Each may raise SchedulerError."""

    def __init__(self, resources: ResourcesSpec) -> None:
        self.resources = resources

    @cached_property
    def config(self) -> Mapping[str, str]:
        """`scontrol show config`."""
        text = slurm.command(["scontrol", "show", "config"])
        return {key: value.strip() for key, value in re.findall(r"^(\w+)\s*= ?(.*)$", text, re.MULTILINE)}

    @cached_property
    def partitions(self) -> Mapping[str, Mapping[str, str]]:
        """`scontrol show partition`, by the partition's name."""
        lines = slurm.command(["scontrol", "show", "partition", "-o"]).splitlines()
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
            if not slurm.answers():
                advice = "on a cluster: is this a login node, is Slurm's module loaded? Without one: --cluster local"
                return warning("no Slurm here: only this machine is looked at", advice)
            version, _ = slurm.command(["scontrol", "--version"]).strip(), self.partitions
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
        words = f"{name}: {fields.get('State')}, {fields.get('TotalNodes')} nodes, up to {fields.get('MaxTime')}"
        if fields.get("State") != "UP":
            return problem(words, "it starts no jobs now; see sinfo, or another --partition")
        if 0 < _seconds(fields.get("MaxTime", "")) < parse_time(self.resources.time):
            words = f"{words}; --time {self.resources.time} is more"
            return problem(words, "a smaller --time; runs are requeued and go on")
        return ok(words)

    def check_nodes(self) -> Finding:
        """Nodes in service, compared with the nodes and GPUs that are asked for."""
        name, wanted = self.partition["PartitionName"], self.resources.gpus_per_node
        rows = _table("sinfo", "--noheader", f"--partition={name}", "--format=%D|%t|%G")
        out = sum(int(count) for count, state, _ in rows if state.startswith(OUT))
        nodes: Counter[int] = Counter()  # in service, by their number of GPUs
        for count, _, gres in (row for row in rows if not row[1].startswith(OUT)):
            nodes[gpus_of(gres)] += int(count)
        words = ", ".join(f"{count} with {gpus} GPUs" for gpus, count in sorted(nodes.items(), reverse=True)) or "none"
        words = f"in service: {words}" + (f"; {out} out of service" if out else "")
        if not nodes:
            return problem(words, "see sinfo -R for the reasons; another --partition")
        if sum(nodes[gpus] for gpus in nodes if gpus >= wanted) < int(self.resources.nodes.split("-")[0]):
            words = f"{words}; {self.resources.nodes} nodes with {wanted} GPUs each are asked for"
            return problem(words, "fewer --nodes or --gpus-per-node, another --partition")
        return ok(words)

    def check_preemption(self) -> Finding:
        """Preemption: by which jobs, and with how much warning."""
        kind = self.config.get("PreemptType", "").rpartition("/")[2]
        if kind == "qos":
            return self._preemption_by_qos()
        mode = self.partition.get("PreemptMode", "OFF").upper()
        if kind in ("", "none", "(null)") or mode == "OFF":
            return ok("jobs of this partition are not preempted")
        by = ""
        if kind == "partition_prio":
            if not (stronger := self._stronger_partitions()):
                return ok("no partition over the same nodes has a higher PriorityTier")
            by = f" by jobs of {', '.join(stronger)}"
        return self._preempted(by, mode, _number(self.partition.get("GraceTime")))

    def _preemption_by_qos(self) -> Finding:
        """The job's QOS decides; the partition's mode and grace time count for nothing."""
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
        return self._preempted(f" by jobs of the QOS {', '.join(sorted(by))}", mode, _seconds(grace))

    def _preempted(self, by: str, mode: str, grace: int) -> Finding:
        if "SUSPEND" in mode or mode == "GANG":
            advice = "a suspended run pauses and goes on later; its log is silent meanwhile"
            return warning(f"suspended{by} (PreemptMode={mode})", advice)
        words = f"preempted{by} (PreemptMode={mode}): "
        if grace:
            return ok(f"{words}SIGTERM, {grace} s of grace; a run saves and requeues itself")
        words += f"no grace: SIGTERM, SIGKILL {self.config.get('KillWait', '?')} later"
        if "CANCEL" in mode:
            advice = "a preempted job is gone, and a run has no time to requeue itself: submit it again to go on"
            return warning(words, advice)
        return ok(words)

    def _stronger_partitions(self) -> list[str]:
        """Partitions with a higher PriorityTier that share nodes with this one."""
        tier, own = _number(self.partition.get("PriorityTier")), _node_names(self.partition)
        higher = {name: p for name, p in self.partitions.items() if _number(p.get("PriorityTier")) > tier}
        return sorted(name for name, fields in higher.items() if own & _node_names(fields))

    def check_requeue(self) -> Finding:
        """The wish to be requeued; only a job can find out if the site allows it."""
        if not self.resources.requeue:
            advice = "preempted runs stay away until they are submitted again: resources.requeue: true"
            return warning("the profile turns requeueing off", advice)
        default = "by default" if self.config.get("JobRequeue") == "1" else "only where a job asks for it"
        return ok(f"Slurm requeues jobs {default} (JobRequeue); runs ask for it (--requeue)")

    def check_account(self) -> Finding:
        """Account and QOS, compared with those that accounting has for this user."""
        if not self.config.get("AccountingStorageType", "").endswith("slurmdbd"):
            return ok("no accounting here: accounts and QOS are not checked by Slurm")
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # a number without a name
            user = str(os.getuid())
        account, qos = self.resources.account, self.resources.qos
        rows = _table(*_SACCTMGR, "assoc", f"user={user}", "format=Account,Partition,QOS")
        accounts = sorted({row[0] for row in rows})
        if not accounts:
            return warning(f"none of {user} is known", "ask your site if sbatch refuses")
        words = f"yours: {', '.join(accounts)}" + (f"; asked for: {account}" if account else "")
        if account is not None and account.lower() not in accounts:
            return problem(words, "--account with one of yours, also in the profile")
        allowed = sorted({name for row in rows for name in row[2].split(",") if name and account in (None, row[0])})
        if qos is not None and allowed and qos not in allowed:
            words = f"QOS {qos} is not among yours: {', '.join(allowed)}"
            return problem(words, "--qos with one of yours, also in the profile")
        if account is None and len(accounts) > 1:
            return ok(words, "without --account the default one is charged; some sites refuse")
        return ok(words)


_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "show")


def gpus_of(gres: str) -> int:
    """GPUs in sinfo's %G, such as gpu:a100:4(S:0-1),nvme:900 or (null)."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^,:()]+)?:([0-9]+)", gres))


def _table(*command: str) -> list[list[str]]:
    """The rows that a command prints, with its columns separated by bars."""
    return [line.split("|") for line in slurm.command(command).splitlines() if "|" in line]


def _node_names(partition: Mapping[str, str]) -> set[str]:
    return set(slurm.command(["scontrol", "show", "hostnames", partition.get("Nodes", "")]).split())


def _seconds(text: str) -> int:
    """Seconds of a time of Slurm's; 0 where it is none, such as UNLIMITED."""
    try:
        return parse_time(text)
    except SpecError:
        return 0


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
