"""Hardware and libraries of an attempt: precision, switches of PyTorch, memory, and the record of them."""

import ctypes
import os
import platform
import resource
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cifar_hpc import __version__
from cifar_hpc.config.spec import Spec


def resolve_amp(spec: Spec, device: torch.device) -> str:
    """Return the precision on this device: bf16, fp16 or fp32."""
    if spec.train.amp != "auto":
        return spec.train.amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def configure_torch(spec: Spec, device: torch.device) -> None:
    """Set the global switches of PyTorch that influence the bits, and keep freed memory on a CPU."""
    if spec.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if spec.train.compile:
            torch.use_deterministic_algorithms(True)
        else:  # the same, without importing torch.compile's modules, which takes most of a second
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
    """Return all that the bits depend on beside the spec and the data."""
    cuda, cpu = device.type == "cuda", f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
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


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the kernel (mallopt(3)).

    A training step on a CPU frees and allocates gigabytes of activations. glibc maps each large block again, and the
    kernel fills it with zeros page by page, which took a third of a step. With this the process keeps its peak memory.
    Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_M_MMAP_MAX, 0):
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def describe_machine() -> dict[str, Any]:
    """Return the processor's name, and versions of the software beside PyTorch; None for an unknown one."""
    return {
        "processor": processor_name(),
        "cifar_hpc": __version__,
        "python": platform.python_version(),
        "torchvision": next((found.version for found in metadata.distributions(name="torchvision")), None),
    }


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the first processor's name in /proc/cpuinfo (proc_cpuinfo(5)); None if it has none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), None)


def peak_memory_bytes() -> int:
    """Most memory that this attempt has used so far: of the device, or of the process on a CPU."""
    if torch.cuda.is_initialized():  # one device; which one, other threads than the main one do not know
        with suppress(RuntimeError):  # of a device that has failed
            return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
