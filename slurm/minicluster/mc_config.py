"""What a minicluster is made of: its settings, the layout of its directory, and its configuration files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pwd
import random
import re
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

MARKER = "minicluster.json"  # settings, ports and daemons; a directory without it is never deleted
KIND = "cifar_hpc minicluster"
ACCOUNT = "cifar"
MEMORY_PER_NODE_MB = 8000

# A unix socket's address holds 108 bytes with the closing NUL. The longest in the directory is a step's own:
# spool/<node>/<node>_<job id>.<step id>, where batch and extern steps have ids of ten digits.
SOCKET_PATH_MAX = 107
LONGEST_JOB_ID = "9999999"
LONGEST_STEP_ID = "4294967295"

# Below the ports the kernel hands out for outgoing connections (32768 and up): none of those can take one of
# ours in the moment between choosing a port and the daemon binding it.
PORT_RANGE = range(20000, 32000)

SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"  # daemons: sbin


class MiniclusterError(Exception):
    """Something a user has to know and can act on; printed without a traceback."""


class MissingPackagesError(MiniclusterError):
    """Programs are not installed, or cannot be."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `up` was asked for, plus what it chose (ports). Stored in the marker file."""

    nodes: int = 2
    cpus: int = 8
    gpus: int = 4
    grace: int = 30
    accounting: bool = True
    programs: str = ""  # the folder of Slurm's programs; empty: those on PATH
    ports: tuple[int, ...] = ()  # slurmctld, slurmdbd, mariadb, then one for each node

    @property
    def node_names(self) -> list[str]:
        """node1, node2, ..."""
        return [f"node{i + 1}" for i in range(self.nodes)]

    @property
    def port_count(self) -> int:
        """How many ports a cluster of this shape needs."""
        return 3 + self.nodes

    @property
    def search_path(self) -> str:
        """PATH of the cluster's programs."""
        return f"{self.programs}:{SEARCH_PATH}" if self.programs else SEARCH_PATH

    def differences(self, other: Settings) -> list[str]:
        """Asked-for values that differ from other's, ports aside."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "ports"]
        return [
            f"{n}={getattr(other, n)} (asked: {getattr(self, n)})"
            for n in names
            if getattr(self, n) != getattr(other, n)
        ]


class Layout:
    """The paths inside a cluster's directory, and the marker file."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.dir = Path(directory).resolve()
        self.conf = self.dir / "slurm.conf"
        self.marker = self.dir / MARKER
        self.run = self.dir / "run"
        self.log = self.dir / "log"
        self.munge_socket = self.run / "munge.sock"
        self.munge_key = self.dir / "munge.key"
        self.database = self.dir / "mysql"
        self.init_sql = self.dir / "init.sql"
        self.slurmdbd_conf = self.dir / "slurmdbd.conf"  # slurmdbd looks for it beside $SLURM_CONF

    @property
    def cluster_name(self) -> str:
        """Unique to the directory. Jobs carry it as SLURM_CLUSTER_NAME, by which `down` knows its own."""
        return "mini" + hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:10]

    def check(self, settings: Settings) -> None:
        """Refuse a directory name that Slurm or the kernel would refuse later, with a far worse message."""
        check_path(self.dir)
        node = settings.node_names[-1]
        longest = f"{self.dir}/spool/{node}/{node}_{LONGEST_JOB_ID}.{LONGEST_STEP_ID}"
        excess = len(longest) - SOCKET_PATH_MAX
        if excess > 0:
            raise MiniclusterError(
                f"{self.dir}: path too long by {excess} characters: unix sockets below it must fit in "
                f"{SOCKET_PATH_MAX} (such as {longest}); choose a shorter --dir"
            )

    def read_marker(self) -> dict[str, Any] | None:
        """The marker's content, or None where the directory is not a minicluster's."""
        try:
            data = json.loads(self.marker.read_text())
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and data.get("kind") == KIND else None

    def write_marker(self, settings: Settings, daemons: dict[str, tuple[int, int]], ready: bool) -> None:
        """Replace the marker as a whole, so that a reader never sees half of one."""
        data = {"kind": KIND, "settings": dataclasses.asdict(settings), "daemons": daemons, "ready": ready}
        temp = self.marker.with_suffix(".tmp")
        temp.write_text(json.dumps(data, indent=1))
        temp.replace(self.marker)


def check_path(path: Path) -> None:
    """Refuse a path that cannot be written into slurm.conf."""
    if not re.fullmatch(r"[A-Za-z0-9._/+-]+", str(path)):
        raise MiniclusterError(f"{path}: Slurm's configuration takes only letters, digits and . _ / + - in a path")


def settings_from_marker(data: dict[str, Any]) -> Settings:
    """The settings a marker file holds."""
    values = dict(data["settings"])
    values["ports"] = tuple(values["ports"])
    return Settings(**values)


def user_name() -> str:
    """Who we are for the kernel. (getpass would ask LOGNAME and USER first, which may lie under su.)"""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise MiniclusterError(f"user id {os.getuid()} has no name on this machine; Slurm needs one") from None


def free_ports(count: int) -> tuple[int, ...]:
    """Ports that nothing on this machine listens on now."""
    candidates = random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE))
    found: list[int] = []
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # every interface: stricter than what the daemons will ask for
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise MiniclusterError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")


def write_all(layout: Layout, settings: Settings) -> None:
    """Create the directory's folders, keys and configuration files."""
    for name in ("run", "log", "state", "spool", "tmp", "dev"):
        (layout.dir / name).mkdir(exist_ok=True)
        (layout.dir / name).chmod(0o755)  # other users' clients must reach munge's socket, whatever our umask is
    for node in settings.node_names:
        (layout.dir / "spool" / node).mkdir(exist_ok=True)
    for i in range(settings.gpus):
        # A character device, as a GPU is one: over plain files Slurm sets no CUDA_VISIBLE_DEVICES.
        (layout.dir / "dev" / f"nvidia{i}").symlink_to("/dev/null")
    _write(layout.munge_key, secrets.token_bytes(128), 0o400)
    _write(layout.conf, slurm_conf(layout, settings).encode(), 0o644)
    _write(layout.dir / "gres.conf", _gres_conf(layout, settings).encode(), 0o644)
    _write(layout.dir / "cgroup.conf", _cgroup_conf(settings).encode(), 0o644)
    if settings.accounting:
        password = secrets.token_hex(16)
        _write(layout.slurmdbd_conf, _slurmdbd_conf(layout, settings, password).encode(), 0o600)
        _write(layout.init_sql, _init_sql(password).encode(), 0o600)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that has its mode from the start (a key must not be readable even for a moment)."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    path.chmod(mode)


def slurm_conf(layout: Layout, settings: Settings) -> str:
    """slurm.conf. Reasons stand beside the lines that are not plain."""
    user = user_name()
    ctld_port, dbd_port, _, *node_ports = settings.ports
    gres = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={settings.cpus}"
        f" RealMemory={MEMORY_PER_NODE_MB}{gres} State=UNKNOWN"
        for name, port in zip(settings.node_names, node_ports, strict=True)
    )
    # AccountingStoragePass names munge's socket, else sacct looks for munge at its system-wide place.
    accounting = (
        f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
        f"AccountingStoragePort={dbd_port}\n"
        f"AccountingStoragePass={layout.munge_socket}\nAccountingStorageTRES=gres/gpu"
        if settings.accounting
        else "AccountingStorageType=accounting_storage/none"
    )
    shared = "Nodes=ALL MaxTime=1-00:00:00 DefaultTime=01:00:00 State=UP"
    return f"""\
# Written by minicluster; the next `up` writes it anew.
ClusterName={layout.cluster_name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
# Listen on the loopback address, not on every interface.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny

StateSaveLocation={layout.dir}/state
SlurmdSpoolDir={layout.dir}/spool/%n
SlurmctldPidFile={layout.run}/slurmctld.pid
SlurmdPidFile={layout.run}/slurmd-%n.pid
{_plugin_dir(settings)}
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd-%n.log
TmpFS={layout.dir}/tmp
MailProg=/bin/true

# No cgroups: they need root and would be shared by all nodes of this machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
ReturnToService=2
# A node may offer more CPUs than the machine has.
SlurmdParameters=config_overrides

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
GresTypes=gpu
# Look for work every second: tests wait for each of these.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
OverTimeLimit=0
{accounting}

{nodes}
PartitionName=gpu {shared} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace}
PartitionName=cancelable {shared} PriorityTier=1 PreemptMode=CANCEL GraceTime={settings.grace}
PartitionName=nograce {shared} PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent {shared} PriorityTier=10 PreemptMode=OFF
"""


def _plugin_dir(settings: Settings) -> str:
    """The line for slurm.conf and slurmdbd.conf, where the programs are those of a tree of mc_release."""
    plugins = Path(str(shutil.which("slurmctld", path=settings.search_path))).parents[1] / "slurm-plugins"
    return f"PluginDir={plugins}" if plugins.exists() else ""


def _cgroup_conf(settings: Settings) -> str:
    """cgroup.conf. By itself, slurmd would take the cgroups over from version 23.02 on, or not start without any."""
    path = os.environ | {"PATH": settings.search_path}
    shown = subprocess.run(["slurmctld", "-V"], env=path, capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", shown)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    # Before there was a word for none, that of version 1 did nothing until a plugin for tasks or processes asked it to.
    return "CgroupPlugin=disabled\n" if version >= (24, 5) else "CgroupPlugin=cgroup/v1\n"


def _gres_conf(layout: Layout, settings: Settings) -> str:
    """gres.conf: links to /dev/null stand in for the GPUs (Slurm refuses a count without files)."""
    if not settings.gpus:
        return "AutoDetect=off\n"
    files = f"{layout.dir}/dev/nvidia" + (f"[0-{settings.gpus - 1}]" if settings.gpus > 1 else "0")
    return "AutoDetect=off\n" + "".join(f"NodeName={n} Name=gpu File={files}\n" for n in settings.node_names)


def _slurmdbd_conf(layout: Layout, settings: Settings, password: str) -> str:
    user = user_name()
    _, dbd_port, sql_port, *_ = settings.ports
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={layout.run}/slurmdbd.pid
{_plugin_dir(settings)}
LogFile={layout.log}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct
"""


def _init_sql(password: str) -> str:
    """Run by mariadbd at every start: slurmdbd's own user, known by a password nobody else has."""
    return f"""\
CREATE DATABASE IF NOT EXISTS slurm_acct;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';
"""
