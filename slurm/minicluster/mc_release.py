"""Slurm of another Debian release, from a tree that debootstrap makes once in a cache folder.

Its programs run by the tree's own loader and libraries, and in this machine's file system as any other program does:
jobs see nothing of the tree.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from mc_config import MissingPackagesError, check_path

RELEASES = ("bookworm", "trixie")  # Slurm 22.05, 24.11
PACKAGES = "slurmctld,slurmd,slurm-client,slurmdbd,munge"
PROGRAMS = (
    "munged slurmctld slurmd slurmstepd slurmdbd sacct sacctmgr salloc sattach sbatch sbcast scancel scontrol sdiag "
    "sinfo sprio squeue sreport srun sshare sstat strigger"
).split()
APT = Path("/etc/apt")
LIMIT_SECONDS = 1200  # a usual call takes one minute
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def programs(release: str) -> Path:
    """Return the folder of a release's programs, made if it is not there yet: a minute or two, as root.

    The lock is held by debootstrap, too, so that nobody makes the tree anew while one whose caller was killed runs on.

    Raises:
        MissingPackagesError: it cannot be made here.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "cifar_hpc"
    check_path(cache)
    tree = cache / release
    if not tree.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{release}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not tree.exists():
                _make(release, tree, lock.fileno())
    return tree / "bin"


def _make(release: str, tree: Path, lock: int) -> None:
    _require_tools(release)
    part = tree.with_name(f"{release}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a call that was interrupted; its mounts went with its namespace
    part.mkdir()
    log = part.with_suffix(".log")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(part / "root"), *mirror()]
    # In namespaces of its own: no mount and no process outlives it, whoever is killed.
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    try:
        with log.open("w") as out:
            subprocess.run(
                [*own, *command],
                env=os.environ | {"PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[lock],
                timeout=LIMIT_SECONDS,
                check=True,
            )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shutil.rmtree(part, ignore_errors=True)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        how = "failed" if isinstance(error, subprocess.CalledProcessError) else f"took more than {LIMIT_SECONDS} s"
        raise MissingPackagesError(
            f"release {release}: debootstrap {how}:\n{tail}\n"
            f"HINT: it needs Debian's archive, and the right to make namespaces and devices; the whole log is {log}"
        ) from None
    _write_wrappers(part, tree)
    part.rename(tree)
    log.unlink()


def _require_tools(release: str) -> None:
    if os.getuid() != 0:
        raise MissingPackagesError(f"release {release}: only root can make its tree. HINT: run this as root")
    if shutil.which("debootstrap", path=PATH) is None:
        raise MissingPackagesError(
            f"release {release}: missing programs: debootstrap\ninstall it with: apt-get install -y debootstrap"
        )


def mirror() -> list[str]:
    """The archive that apt uses here, if this is a Debian; else debootstrap's own default."""
    files = [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]
    text = "\n".join(
        file.read_text(errors="replace") for file in files if file.suffix in (".list", ".sources") and file.exists()
    )
    return re.findall(r"^(?:URIs:|deb ).*?(https?://\S+/debian)/?(?=\s|$)", text, re.MULTILINE)[:1]


def _write_wrappers(part: Path, tree: Path) -> None:
    """Write bin/<program>, a script that runs the program by its loader.

    The loader goes by the program's name, which is what the kernel then calls the process. It is given the libraries as
    an option, since a variable would reach the jobs.
    """
    (loader,) = (part / "root" / "usr" / "lib").glob("*/ld-linux-*.so.*")
    libraries = tree / loader.parent.relative_to(part)
    (part / "slurm-plugins").symlink_to(libraries / "slurm-wlm")  # where mc_config looks for it
    for folder in ("bin", "loader"):
        (part / folder).mkdir()
    for name in PROGRAMS:
        # Below /etc/alternatives links are absolute, and lead out of the tree.
        places = [part / "root" / "usr" / place for place in (f"sbin/{name}-wlm", f"sbin/{name}", f"bin/{name}")]
        program = tree / next(path for path in places if path.exists()).relative_to(part)
        (part / "loader" / name).symlink_to(libraries / loader.name)
        # The script is what the daemons start as themselves, and slurmd as slurmstepd.
        words = [tree / "loader" / name, "--argv0", tree / "bin" / name]
        words += ["--library-path", f"{libraries}:{libraries}/slurm-wlm", program]
        words += ["-d", tree / "bin" / "slurmstepd"] if name == "slurmd" else []
        script = part / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        script.chmod(0o755)
