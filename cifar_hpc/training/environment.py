"""The machine and the libraries of an attempt: precision, switches of PyTorch, memory, and what is recorded of them."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cifar_hpc import __version__
from cifar_hpc.config.spec import Spec


def resolve_amp(spec: Spec, device: torch.device) -> str:
    """bf16, fp16 or fp32: what train.amp means on this device."""
    if spec.train.amp != "auto":
        return spec.train.amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def configure_torch(spec: Spec, device: torch.device) -> None:
    """Global switches of PyTorch that decide about the bits."""
    if spec.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if spec.train.compile:
            torch.use_deterministic_algorithms(True)
        else:  # the same for all but torch.compile, which the other call imports: most of a second
            torch.set_deterministic_debug_mode("error")
        # Every buffer is written before it is read, so filling them first would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(spec.train.cpu_threads or 1)
    if device.type == "cpu":
        keep_freed_memory()


def describe_environment(spec: Spec, device: torch.device) -> dict[str, Any]:
    """What, beside the spec, the bits depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "threads": None if cuda else spec.train.cpu_threads or 1,
        "amp": resolve_amp(spec, device),
        "deterministic": spec.train.deterministic,
    }


# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, instead of giving it back and asking for it again.

    A training step on a CPU frees and allocates gigabytes of activations. glibc maps each large one anew, and the
    kernel fills it with zeros page by page, which took a third of a step (mallopt(3)). The process then keeps the
    memory of its largest moment.

    Returns:
        Whether that is possible here; elsewhere than in glibc it is not, and changes nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


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
