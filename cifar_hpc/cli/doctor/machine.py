"""Checks of this machine: Python, site profile, packages, torch, images, file system. Never imports torch."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cifar_hpc.cli.doctor.node import Plan, hold_lock, is_locked
from cifar_hpc.cli.doctor.report import Finding, error_text, ok, problem, warning
from cifar_hpc.cli.submit import DEFAULT_JOB
from cifar_hpc.config.io import from_plain, load_values
from cifar_hpc.config.site import Site, load_site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError, UserError
from cifar_hpc.files import read_regular, write_atomic
from cifar_hpc.runs.paths import PROJECT

PROBE_SECONDS = 300
# On one machine's own disk or memory; a login node may of course export them to the others.
LOCAL_TYPES = {"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "squashfs"}
LOCAL_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/local"), Path("/localscratch"))
# Mount options under which other nodes do not see a lock: mount.lustre(8), nfs(5).
PRIVATE_LOCKS = {"localflock", "nolock", "local_lock=all", "local_lock=flock", "noflock"}
# The full model's weights, slow weights and momentum are 59 MB a checkpoint, of which a run keeps five or so.
WARNING_BYTES, PROBLEM_BYTES = 5e9, 5e8


def read_site(profile: str, flags: Mapping[str, Any]) -> tuple[Finding, Site, Spec]:
    """The site profile; and the spec of the default job there, which the other checks are about.

    Args:
        flags: values of the section `resources`, above the site's.
    """
    try:
        site, defaults = load_site(profile)
        spec = from_plain(load_values(DEFAULT_JOB, [], {"resources": defaults}, {"resources": flags}))
    except (UserError, OSError) as error:
        advice = "correct the profile or the flag; the rest is checked without them"
        finding = Finding("site", "problem", error_text(error), advice)
        return finding, Site(), from_plain(load_values(DEFAULT_JOB))
    script = "\n".join([*site.setup, f"{site.python} -c pass" if site.python else "", ""])
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if wrong := syntax.stderr.strip():
        words = f"{profile}: setup or python is no valid shell code: {wrong}"
        return Finding("site", "problem", words, "correct it"), site, spec
    words = f"{profile}: Python of the compute nodes: {site.python or f'{sys.executable} (this one)'}"
    return Finding("site", "ok", words), site, spec


def plan_of(spec: Spec, root: Path) -> Plan:
    """Facts for the checks of other processes, which import torch, here and on the compute nodes."""
    file = PROJECT / "requirements.txt"
    pins = parse_requirements(file.read_text()) if file.exists() else {}
    gpus = 0 if spec.train.device == "cpu" else spec.resources.gpus_per_node
    folder = str(root / spec.data.root)
    return Plan(pins, spec.data.source, folder, gpus, spec.resources.requeue, platform.python_version())


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


class Mount(NamedTuple):
    """The file system of a path."""

    point: str
    kind: str
    options: set[str]


def mount_of(path: Path, mountinfo: str) -> Mount:
    """The mount that holds `path`, which must be absolute and resolved.

    Args:
        mountinfo: the text of /proc/self/mountinfo (proc(5)).
    """
    found = Mount("/", "unknown", set())
    line = re.compile(r"^(?:\S+ ){4}(\S+) (\S+) (?:\S+ )*?- (\S+) \S+ (\S+)", re.MULTILINE)
    for point, options, kind, more in line.findall(mountinfo):
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= len(found.point):  # of two on one point the later one is seen
            found = Mount(point, kind, {*options.split(","), *more.split(",")})
    return found


def check_file_system(folder: Path, alone: bool) -> Finding:
    """Writing, fsync and rename in the folder of checkpoints/ and logs/, and whether other machines can share it.

    Args:
        alone: there is no Slurm, so no other machine has to share it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch(folder) as scratch:
            file = Path(scratch) / "a"
            write_atomic(file, b"before")
            write_atomic(file, b"after")
            if read_regular(file) != b"after":
                raise OSError("a file that was replaced still shows its old content")
    except OSError as error:
        words = f"{folder}: writing, fsync or rename failed: {error.strerror or error}"
        return problem(words, "set CIFAR_HPC_ROOT to a folder that you can write and that the compute nodes share")
    mount = mount_of(folder, _mountinfo())
    words = f"{folder} ({mount.kind} on {mount.point}): writing, fsync and rename work"
    if alone or not (mount.kind in LOCAL_TYPES or any(folder.is_relative_to(p) for p in LOCAL_FOLDERS)):
        return ok(words)
    advice = "compute nodes must see the same folder; --job finds out. Else clone elsewhere, or set CIFAR_HPC_ROOT"
    return warning(f"{words}, but this may be this machine's own disk", advice)


def check_locks(folder: Path) -> Finding:
    """Locks (flock), which keep a run to one writer."""
    advice = "only Slurm keeps a run to one writer then: do not start it by hand or with --cluster local as well"
    if private := mount_of(folder, _mountinfo()).options & PRIVATE_LOCKS:
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
