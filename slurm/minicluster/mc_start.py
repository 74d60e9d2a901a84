"""Starting a minicluster's daemons in order, waiting for each; a failure names one and shows its log."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable

import mc_procs as procs
from mc_config import ACCOUNT, Layout, MiniclusterError, Settings, user_name, write_all

LOG_TAIL_LINES = 15
Completed = subprocess.CompletedProcess[str]


def environment(layout: Layout, settings: Settings) -> dict[str, str]:
    """For our own clients and daemons: nothing of the caller's, who may be inside a job of a real Slurm."""
    home = os.environ.get("HOME", "/")
    return {"PATH": settings.search_path, "HOME": home, "LC_ALL": "C", "SLURM_CONF": str(layout.conf)}


def client(layout: Layout, settings: Settings, *command: str, timeout: float = 15.0) -> Completed:
    """Run a Slurm client against this cluster; no answer in time counts as the client's failure."""
    try:
        return subprocess.run(
            command,
            env=environment(layout, settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Completed(command, 124, "", f"{command[0]}: no answer within {timeout:.0f} s")


class Starter:
    """One start of one cluster. `daemons` holds what has been started so far, also after a failure."""

    def __init__(self, layout: Layout, settings: Settings, limit: float) -> None:
        self.layout = layout
        self.settings = settings
        self.limit = limit
        self.deadline = time.monotonic() + limit
        self.daemons: dict[str, procs.Daemon] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start every daemon, and return when the cluster has run a first job."""
        layout, settings = self.layout, self.settings
        layout.write_marker(settings, {}, ready=False)
        write_all(layout, settings)
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=4", f"--key-file={layout.munge_key}"),
            *(f"--socket={layout.munge_socket}", f"--pid-file={layout.run}/munged.pid"),
            *(f"--log-file={layout.log}/munged.log", f"--seed-file={layout.run}/munged.seed"),
        )
        if settings.accounting:
            self._start_database()
        self._await("munged", layout.munge_socket.exists)
        if settings.accounting:
            self._start_accounting()
        self._slurm_daemon("slurmctld")
        for name in settings.node_names:
            self._daemon(f"slurmd-{name}", "slurmd", "-D", "-N", name)
        self._await("slurmctld", self._all_idle)
        count = str(settings.nodes)
        job = ("srun", "-p", "gpu", "-N", count, "-n", count, "-t", "1", "true")
        trial = client(layout, settings, *job, timeout=max(1.0, self._left()))
        if trial.returncode != 0:
            raise self._failure("slurmctld", f"a first job failed: {trial.stderr.strip()}")
        if settings.accounting:  # the first records may take seconds, later ones a fraction of one
            self._await("slurmdbd", self._trial_accounted)
        layout.write_marker(settings, self.daemons, ready=True)

    def start_again(self, name: str) -> None:
        """Start one of Slurm's daemons of a cluster that is up (`daemons` names them all)."""
        try:
            self._slurm_daemon(name)
        finally:
            self.layout.write_marker(self.settings, self.daemons, ready=True)

    def collect(self) -> None:
        """Collect the exit codes of daemons that have ended, so that no zombie of ours is left."""
        for process in self._processes.values():
            process.poll()

    def _start_database(self) -> None:
        layout, port = self.layout, self.settings.ports[2]
        where = [f"--datadir={layout.database}", f"--tmpdir={layout.dir}/tmp", "--skip-name-resolve"]
        if os.getuid() == 0:
            where.append("--user=root")
        with (layout.log / "mariadb-install.log").open("wb") as out:
            done = subprocess.run(
                ["mariadb-install-db", "--no-defaults", "--skip-test-db", *where],
                env=self._daemon_environment(),
                cwd=layout.dir,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                check=False,
            )
        if done.returncode != 0:
            raise self._failure("mariadb-install", f"ended with code {done.returncode}")
        self._daemon(
            "mariadbd",
            *("mariadbd", "--no-defaults", *where, "--bind-address=127.0.0.1", f"--port={port}"),
            *(f"--socket={layout.run}/mysql.sock", f"--pid-file={layout.run}/mariadbd.pid"),
            *(f"--init-file={layout.init_sql}", "--innodb-buffer-pool-size=64M"),
            "--innodb-lock-wait-timeout=900",  # slurmdbd asks for it
            # No durability: the database dies with its cluster.
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0", "--innodb-flush-method=nosync"),
        )
        self._await("mariadbd", lambda: _listens(port))

    def _start_accounting(self) -> None:
        cluster = self.layout.cluster_name
        self._slurm_daemon("slurmdbd")
        about = ("Description=cifar_hpc", "Organization=cifar_hpc")
        for words in (
            ("cluster", cluster),
            ("account", ACCOUNT, f"Cluster={cluster}", *about),
            ("user", user_name(), f"Account={ACCOUNT}", f"DefaultAccount={ACCOUNT}"),
        ):
            added = client(self.layout, self.settings, "sacctmgr", "-i", "add", *words)
            if added.returncode != 0:
                said = (added.stdout + added.stderr).strip()
                raise self._failure("slurmdbd", f"sacctmgr add {words[0]}: {said}")

    def _slurm_daemon(self, name: str) -> None:
        """Start slurmctld, slurmdbd or slurmd-<node>, and wait until it listens."""
        program, _, node = name.partition("-")
        names = ["slurmctld", "slurmdbd", "mariadbd", *(f"slurmd-{n}" for n in self.settings.node_names)]
        port = self.settings.ports[names.index(name)]
        self._daemon(name, program, "-D", *(("-N", node) if node else ()))
        self._await(name, lambda: _listens(port))

    def _daemon_environment(self) -> dict[str, str]:
        ours = {procs.DIR_VARIABLE: str(self.layout.dir), "TMPDIR": f"{self.layout.dir}/tmp"}
        return environment(self.layout, self.settings) | ours

    def _daemon(self, name: str, *command: str) -> None:
        """Start a daemon, and note it in the marker at once: even a killed `up` can be cleared away."""
        output = self.layout.log / f"{name}.out"
        process = procs.start_daemon(command, self._daemon_environment(), self.layout.dir, output)
        self._processes[name] = process
        self.daemons[name] = procs.identify(process.pid)
        self.layout.write_marker(self.settings, self.daemons, ready=False)

    def _await(self, name: str, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; the end of any daemon, or too long a time, is a failure."""
        while not condition():
            for other, process in self._processes.items():
                if process.poll() is not None:
                    raise self._failure(other, f"ended with code {process.returncode}")
            if self._left() <= 0:
                raise self._failure(name, f"not ready within {self.limit:.0f} s")
            time.sleep(0.05)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _failure(self, name: str, what: str) -> MiniclusterError:
        lines = [f"{name}: {what}"]
        for path in sorted(self.layout.log.glob(f"{name}.*")):
            tail = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            if tail:
                lines += [f"--- end of {path}", *tail]
        lines.append(f"(logs stay in {self.layout.log} until the next up or down)")
        return MiniclusterError("\n".join(lines))

    def _all_idle(self) -> bool:
        shown = client(self.layout, self.settings, "sinfo", "-h", "-p", "gpu", "-N", "-o", "%T", timeout=5)
        return shown.stdout.split() == ["idle"] * self.settings.nodes

    def _trial_accounted(self) -> bool:
        return client(self.layout, self.settings, "sacct", "-n", "-X", "-o", "State", timeout=5).stdout.split() == [
            "COMPLETED"
        ]


def _listens(port: int) -> bool:
    """Whether something accepts connections on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
