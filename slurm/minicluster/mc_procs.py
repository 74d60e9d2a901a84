"""Processes of a minicluster: starting daemons detached, finding all that belongs to one, ending it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

DIR_VARIABLE = "CIFAR_HPC_MINICLUSTER"  # in the environment of every daemon; slurmstepd inherits it from slurmd
Daemon = tuple[int, int]  # process id, and start time in clock ticks since boot: ids are used again, the pair is not


def start_daemon(command: tuple[str, ...], env: dict[str, str], cwd: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a foreground daemon in a session of its own that holds none of the caller's files open."""
    with output.open("ab") as out:
        return subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start time) of a process, or None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return fields[0], int(fields[1]), int(fields[19])


def identify(pid: int) -> Daemon:
    """A process id with its start time."""
    stat = _stat(pid)
    return pid, stat[2] if stat else 0


def alive(daemon: Daemon) -> bool:
    """Whether this very process still runs. A zombie does not: pid 1 of a container may never collect it."""
    stat = _stat(daemon[0])
    return stat is not None and stat[0] not in "ZX" and stat[2] == daemon[1]


def living(processes: Iterable[Daemon]) -> list[Daemon]:
    """Those that still run."""
    return [process for process in processes if alive(process)]


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:  # gone meanwhile, or somebody else's
        return set()


def on_node(cluster_name: str, node: str) -> list[Daemon]:
    """Every live process of a job on this node of the cluster, children before parents, the slurmstepds last."""
    marks = {os.fsencode(f"SLURM_CLUSTER_NAME={cluster_name}"), os.fsencode(f"SLURMD_NODENAME={node}")}
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = {pid for pid in pids if marks <= _environment(pid)}
    parents = {stat[1] for pid in found if (stat := _stat(pid)) is not None}
    above = {pid for pid in parents if _name(pid) == "slurmstepd"}
    return living(identify(pid) for pid in [*sorted(found - above, reverse=True), *above])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def belonging(directory: Path, cluster_name: str, daemons: Iterable[Daemon]) -> list[Daemon]:
    """Every live process of the cluster in this directory.

    That is: the daemons; what carries their environment (slurmstepd is a child of pid 1: the tree does
    not lead to it); what carries a job's environment ON a node (SLURMD_NODENAME tells a job from a shell that
    only has SLURM_CONF exported, which must live); and all descendants of those.
    """
    daemon_mark = os.fsencode(f"{DIR_VARIABLE}={directory}")
    job_mark = os.fsencode(f"SLURM_CLUSTER_NAME={cluster_name}")
    parents: dict[int, int] = {}
    starts: dict[int, int] = {}
    members = {d[0] for d in daemons if alive(d)}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        stat = _stat(pid)
        if stat is None or stat[0] in "ZX":
            continue
        parents[pid], starts[pid] = stat[1], stat[2]
        env = _environment(pid)
        if daemon_mark in env or (job_mark in env and any(v.startswith(b"SLURMD_NODENAME=") for v in env)):
            members.add(pid)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in members} - members
        members |= children
        grown = bool(children)
    members.discard(os.getpid())
    return [(pid, starts[pid]) for pid in sorted(members) if pid in starts]


def send(processes: Iterable[Daemon], number: signal.Signals) -> None:
    """Signal those that still run."""
    for pid, _ in living(processes):
        with contextlib.suppress(ProcessLookupError):  # ended between the look and the signal
            os.kill(pid, number)


def end(find: Callable[[], list[Daemon]], patience: float, limit: float = 20.0) -> list[Daemon]:
    """End all that find() finds: SIGTERM, after `patience` s SIGKILL. Returns what outlived `limit` s.

    find() is asked anew each time, since what is being ended may still start something.
    """
    start = time.monotonic()
    asked: set[Daemon] = set()
    while remaining := find():
        waited = time.monotonic() - start
        if waited > limit:
            return remaining
        if waited > patience:
            send(remaining, signal.SIGKILL)
        else:
            send([p for p in remaining if p not in asked], signal.SIGTERM)
            asked.update(remaining)
        time.sleep(0.05)
    return []
