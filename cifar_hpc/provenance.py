"""Where a start of a run happens, for whoever reads its results later; what decides about the bits is elsewhere
(`engine.describe_environment`)."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from cifar_hpc import __version__


def describe_machine() -> dict[str, Any]:
    """The processor's name, and the versions of what computes beside PyTorch; null where one is not known."""
    return {
        "processor": processor_name(),
        "cifar_hpc": __version__,
        "python": platform.python_version(),
        "torchvision": _version("torchvision"),
    }


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """As /proc/cpuinfo calls the first processor (proc_cpuinfo(5)); None where it does not say."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
