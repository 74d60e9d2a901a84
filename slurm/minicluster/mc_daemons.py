"""Single daemons of a running minicluster: stopping one, losing a whole node, starting it again."""

from __future__ import annotations

import functools
import signal

import mc_procs as procs
import mc_start
from mc_cluster import Cluster
from mc_config import MiniclusterError

START_LIMIT = 30.0  # seconds until a daemon that was started again answers
STOP_PATIENCE = 10.0  # seconds for a daemon to end by itself


def stop(cluster: Cluster, name: str, kill: bool) -> str:
    """End one daemon, by SIGTERM (it saves its state) or by SIGKILL; returns a line for the user.

    What a slurmd has started runs on, as it does when an administrator restarts slurmd.
    """
    with cluster.running():
        daemon = _find(cluster, name)
        if not procs.alive(daemon):
            return f"{name} is down already"
        if kill:
            procs.send([daemon], signal.SIGKILL)
        procs.end(functools.partial(procs.living, [daemon]), STOP_PATIENCE)
    return f"{name} is down"


def lose(cluster: Cluster, node: str) -> str:
    """End a node's slurmd and everything that runs on the node in one moment, as if its power had failed."""
    name = f"slurmd-{node}"
    with cluster.running():
        daemon = _find(cluster, name)

        def everything() -> list[procs.Daemon]:
            return [*procs.on_node(cluster.name, node), *procs.living([daemon])]

        # Killed one by one, what dies last would still tell: srun's shepherd kills the whole step once srun is gone.
        # So all are stopped first, until nothing new turns up. What stands above the others is killed last: a process
        # group that is orphaned while it is stopped is woken by SIGHUP and SIGCONT (_exit(2)).
        stopped: set[procs.Daemon] = set()
        while new := [process for process in everything() if process not in stopped]:
            procs.send(new, signal.SIGSTOP)
            stopped.update(new)
        procs.end(everything, patience=-1.0)
    return f"{node} is lost"


def start(cluster: Cluster, name: str) -> str:
    """Start a daemon that is down, and wait until it answers."""
    with cluster.running():
        if procs.alive(_find(cluster, name)):
            return f"{name} is up already"
        starter = mc_start.Starter(cluster.layout, cluster.settings, START_LIMIT)
        starter.daemons = cluster.daemons
        starter.start_again(name)
    return f"{name} is up"


def _find(cluster: Cluster, name: str) -> procs.Daemon:
    known = [n for n in cluster.daemons if n.startswith("slurm")]
    if name not in known:
        raise MiniclusterError(f"{name}: no such daemon; there are: {', '.join(known)}")
    return cluster.daemons[name]
