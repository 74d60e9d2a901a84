"""python -m cifar_hpc.cli.doctor.doctor_probe SOURCE FOLDER PACKAGE ...: this Python, as one JSON object.

The login node runs it in a process of its own, since torch is never imported there; a task of doctor's job calls it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def main(source: str, folder: str, *packages: str) -> int:
    """Print `facts`."""
    print(json.dumps(facts(source, Path(folder), packages)))
    return 0


def facts(source: str, folder: Path, packages: Iterable[str]) -> dict[str, Any]:
    """This Python, the versions of `packages`, what importing torch gives, and the state of the images."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in packages},
        "torch": torch_facts(),
        "data": data_problem(source, folder),
    }


def torch_facts() -> dict[str, Any]:
    """Versions, what it is built for (None: the CPU), seconds of the import, usable devices; or only `error`."""
    begin = time.monotonic()
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "version": torch.__version__,
        "seconds": round(time.monotonic() - begin, 1),
        "built": f"ROCm {torch.version.hip}"
        if torch.version.hip
        else torch.version.cuda and f"CUDA {torch.version.cuda}",
        "usable": torch.cuda.is_available(),
        "devices": _devices(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _devices() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def data_problem(source: str, folder: Path) -> str | None:
    """What is wrong with the images, or None."""
    from cifar_hpc.data.image_folder import list_folder
    from cifar_hpc.errors import UserError

    try:
        if source == "folder":
            list_folder(folder)
        elif source == "cifar10":
            from cifar_hpc.data.cifar10 import check_cifar10

            check_cifar10(folder)
    except (UserError, ImportError, OSError) as error:
        return str(error)
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
