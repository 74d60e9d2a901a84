"""Bringing a minicluster up and down, safely when called twice, at once, or after a crash."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Iterator

import mc_procs as procs
import mc_start
from mc_config import Layout, MiniclusterError, MissingPackagesError, Settings, free_ports, settings_from_marker

START_LIMIT = 60.0  # seconds for the whole of `up`; a usual one takes 5 to 8
PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


class Cluster:
    """One minicluster, named by its directory."""

    def __init__(self, directory: str) -> None:
        self.layout = Layout(directory)
        self.settings = Settings()
        self.daemons: dict[str, procs.Daemon] = {}
        self.load()

    def load(self) -> bool:
        """Read the marker file; whether it says that an `up` was completed."""
        self.daemons = {}
        marker = self.layout.read_marker()
        if marker is None:
            return False
        self.settings = settings_from_marker(marker)
        self.daemons = {name: (pid, start) for name, (pid, start) in marker["daemons"].items()}
        return bool(marker["ready"])

    @property
    def name(self) -> str:
        """What jobs carry as SLURM_CLUSTER_NAME."""
        return self.layout.cluster_name

    def client(self, *command: str, timeout: float = 15.0) -> mc_start.Completed:
        """Run a Slurm client against this cluster."""
        return mc_start.client(self.layout, self.settings, *command, timeout=timeout)

    def healthy(self) -> bool:
        """Whether an `up` was completed, every daemon lives, and the controller answers."""
        if not self.load() or not all(procs.alive(d) for d in self.daemons.values()):
            return False
        ping = self.client("scontrol", "ping", timeout=5)
        return ping.returncode == 0 and "is UP" in ping.stdout

    def up(self, wanted: Settings) -> str:
        """Bring the cluster up unless it is; returns a line for the user."""
        begin = time.monotonic()
        self.layout.check(wanted)
        _require_programs(wanted)
        with self._locked():
            if self.healthy():
                line = f"already up in {self.layout.dir}"
                other = ", ".join(wanted.differences(self.settings))
                return f"{line}\nnote: it runs with {other}; `down` first to change that" if other else line
            self._clear()
            self.settings = Settings(**{**vars(wanted), "ports": free_ports(wanted.port_count)})
            starter = mc_start.Starter(self.layout, self.settings, START_LIMIT)
            try:
                starter.start()
            except BaseException:
                self.daemons = starter.daemons
                self._stop()
                starter.collect()
                self.layout.write_marker(self.settings, {}, ready=False)
                raise
        return f"up in {time.monotonic() - begin:.1f} s: {self.layout.dir}"

    def down(self) -> str:
        """End every process of the cluster and remove its directory; returns a line for the user."""
        directory = self.layout.dir
        if not directory.is_dir():
            return f"nothing is up in {directory}"
        own_job = os.environ.get("SLURM_CLUSTER_NAME") == self.layout.cluster_name
        if own_job and "SLURMD_NODENAME" in os.environ:
            raise MiniclusterError("down would end the very job it is called from; call it from outside")
        if self.layout.read_marker() is None:
            raise MiniclusterError(f"{directory} is not a minicluster's; left as it is")
        with self._locked():
            if self.layout.read_marker() is None:  # another `down` was faster: the directory is the lock's own
                directory.rmdir()
            else:
                self.load()
                self._stop()
                shutil.rmtree(directory)
        return f"down: {directory} removed"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Own the directory of a cluster that is up.

        Raises:
            MiniclusterError: where there is none.
        """
        if not self.layout.dir.is_dir():
            raise MiniclusterError(f"nothing is up in {self.layout.dir}")
        with self._locked():
            if not self.load():
                raise MiniclusterError(f"no cluster is up in {self.layout.dir}; `up` starts one")
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Own the directory (made if need be) while working on it.

        The lock is on the directory itself: no file is left beside it, and it dies with its holder.
        """
        directory = self.layout.dir
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if directory.exists() and os.path.samestat(os.fstat(handle), directory.stat()):
                    yield
                    return
                # A `down` that we waited for has removed this directory: make a new one.
            finally:
                os.close(handle)

    def _clear(self) -> None:
        """Make the directory empty; refuse one that holds somebody's files."""
        directory = self.layout.dir
        if directory.stat().st_uid != os.getuid():
            raise MiniclusterError(f"{directory} belongs to another user; choose another --dir")
        if self.layout.read_marker() is not None:
            self._stop()
        elif any(directory.iterdir()):
            raise MiniclusterError(f"{directory} is neither empty nor a minicluster's; choose another --dir")
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        directory.chmod(0o755)  # mkdtemp's 0700 would lock out jobs of other users

    def _stop(self) -> None:
        """End all processes so that nothing new can begin: scheduler, then nodes, then jobs and the rest."""
        for prefix, patience in (("slurmctld", 1.0), ("slurmd-", 2.0)):
            group = [daemon for name, daemon in self.daemons.items() if name.startswith(prefix)]
            procs.end(functools.partial(procs.living, group), patience)
        left = procs.end(self._members, patience=4.0)
        if left:
            raise MiniclusterError(f"processes that outlive SIGKILL: {[pid for pid, _ in left]}")
        self.daemons = {}

    def _members(self) -> list[procs.Daemon]:
        """All live processes of this cluster."""
        return procs.belonging(self.layout.dir, self.layout.cluster_name, self.daemons.values())


def _require_programs(wanted: Settings) -> None:
    """Say everything that is missing at once, with the line that installs it."""
    needed = PACKAGES | (ACCOUNTING_PACKAGES if wanted.accounting else {})
    missing = [program for program in needed if shutil.which(program, path=wanted.search_path) is None]
    if missing:
        packages = " ".join(dict.fromkeys(needed[program] for program in missing))
        raise MissingPackagesError(
            f"missing programs: {', '.join(missing)}\n"
            f"install them with: apt-get install -y --no-install-recommends {packages}"
        )
