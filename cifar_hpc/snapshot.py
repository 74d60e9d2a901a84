"""A copy of the code for each submission, so that editing the project never changes a queued job."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from cifar_hpc.paths import RunPaths


def take_snapshot(paths: RunPaths) -> Path:
    """Copy the package to logs/<run>/code/<digest>/cifar_hpc and return the folder above it, from which jobs run."""
    package = Path(__file__).resolve().parent
    files = sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    target = paths.code / digest.hexdigest()[:12]
    if target.exists():
        return target
    temporary = paths.code / f".{target.name}.{os.getpid()}.tmp"
    try:
        for file in files:
            copy = temporary / package.name / file.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        if not target.exists():
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
