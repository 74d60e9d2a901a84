"""Doctor's checks of this machine: Python, packages, torch, the site profile and the images. Never imports torch."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_hpc.cli.doctor.doctor_report import Finding
from cifar_hpc.cli.submit import DEFAULT_JOB
from cifar_hpc.config.io import from_plain, load_values
from cifar_hpc.config.site import Site, load_site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError, UserError

CODE = Path(__file__).resolve().parents[3]
LEAST_PYTHON = (3, 11)
PROBE_SECONDS = 300
SLOW_IMPORT_SECONDS = 30.0
INSTALL = "make .venv/.run && . .venv/bin/activate"


def check_site(profile: str, flags: Mapping[str, Any]) -> tuple[Finding, Site, Spec]:
    """The site profile; and the spec of the default job there, which the other checks are about.

    Args:
        flags: values of the section `resources`, above the site's.
    """
    try:
        site, defaults = load_site(profile)
        spec = from_plain(load_values(DEFAULT_JOB, [], {"resources": defaults}, {"resources": flags}))
    except (UserError, OSError) as error:
        words = str(error) if isinstance(error, UserError) else f"{error.filename}: {error.strerror}"
        finding = Finding("site", "problem", words, "mend the profile or the flag; the rest is checked without them")
        return finding, Site(), from_plain(load_values(DEFAULT_JOB))
    wrong = _shell_error(site)
    if wrong:
        return Finding("site", "problem", f"{profile}: setup or python is no shell: {wrong}", "mend it"), site, spec
    python = site.python or f"{sys.executable} (this one)"
    return Finding("site", "ok", f"{profile}: Python of the compute nodes: {python}"), site, spec


def _shell_error(site: Site) -> str:
    script = "\n".join([*site.setup, f"{site.python} -c pass" if site.python else "", ""])
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def check_python() -> Finding:
    """The version of the Python that submits."""
    words = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < LEAST_PYTHON:
        return Finding("python", "problem", f"{words}; needed: 3.11 or newer", "make PYTHON=python3.12 .venv/.run")
    return Finding("python", "ok", words)


def required() -> dict[str, str]:
    """The versions that requirements.txt pins, by package; empty where the file is not there."""
    try:
        return parse_requirements((CODE / "requirements.txt").read_text())
    except OSError:
        return {}


def parse_requirements(text: str) -> dict[str, str]:
    """{package: version} of the lines `package==version`."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s#;]+)", text, re.MULTILINE))


def compare_packages(check: str, found: Mapping[str, str | None], pins: Mapping[str, str], where: str) -> Finding:
    """What is installed beside what requirements.txt pins.

    Args:
        found: by package, None where it is not installed.
        where: `here` or the nodes.
    """
    if not pins:
        return Finding(check, "ok", "no requirements.txt here to compare with")
    missing = [name for name in pins if found.get(name) is None]
    if missing:
        return Finding(
            check,
            "problem",
            f"not installed {where}: {', '.join(missing)}",
            f"{INSTALL}; or name another Python in the profile (python:)",
        )
    # torch calls itself 2.12.1+cu130, which is 2.12.1 of the index.
    other = [f"{n} {found[n]} (pinned: {pins[n]})" for n in pins if str(found[n]).partition("+")[0] != pins[n]]
    if other:
        return Finding(
            check,
            "warning",
            f"{where}: {', '.join(other)}",
            "not the versions that were tested; the same bits need the same versions for all starts of a run",
        )
    return Finding(check, "ok", f"{len(pins)} packages as in requirements.txt, {where}")


def probe(spec: Spec, root: Path, packages: Mapping[str, str]) -> dict[str, Any]:
    """`doctor_probe.facts` of this very Python, from a process of its own.

    Raises:
        SpecError: with the process's last words.
    """
    arguments = [spec.data.source, str(root / spec.data.root), *packages]
    command = [sys.executable, "-m", "cifar_hpc.cli.doctor.doctor_probe", *arguments]
    try:
        done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SpecError(f"importing torch took more than {PROBE_SECONDS} s.") from None
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise SpecError(last[0]) from None
    return facts


def check_torch(facts: Mapping[str, Any]) -> Finding:
    """Whether torch can be imported, and how long that takes; CUDA is not needed where one submits."""
    torch = facts["torch"]
    if "error" in torch:
        return Finding("torch", "problem", f"import torch: {torch['error']}", INSTALL)
    built = torch["built"] or "the CPU only"
    words = f"torch {torch['version']}, built for {built}, imported in {torch['seconds']:.1f} s"
    if torch["seconds"] > SLOW_IMPORT_SECONDS:
        return Finding(
            "torch",
            "warning",
            words,
            "every start and every restart waits for it: put the environment on a faster file system, or into a "
            "container image (docs/clusters.md)",
        )
    return Finding("torch", "ok", words)


def check_data(spec: Spec, root: Path, facts: Mapping[str, Any]) -> Finding:
    """Whether the images of the default job are there. Missing ones are downloaded by submit.py, not by doctor."""
    words = f"{spec.data.source} in {root / spec.data.root}" if spec.data.source != "synthetic" else "synthetic"
    if facts["data"] is None:
        return Finding("data", "ok", words)
    advice = "submit.py downloads it on a machine with internet; --set data.source=synthetic needs nothing"
    return Finding(
        "data", "warning" if spec.data.source == "cifar10" else "problem", without_hint(facts["data"]), advice
    )


def without_hint(words: str) -> str:
    """An error's message without the hint at its end, where there is better advice."""
    return words.partition(" HINT: ")[0]
