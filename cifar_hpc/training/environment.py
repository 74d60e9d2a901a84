"""Hardware and libraries of an attempt: precision, switches of PyTorch, memory, the record of them, and the check that
they are the same on all ranks."""

import ctypes
import os
import platform
import re
import resource
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cifar_hpc import __version__
from cifar_hpc.config.io import covered, flatten, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import RanksDifferError, RunFailedError
from cifar_hpc.runs.paths import PACKAGE, package_files
from cifar_hpc.tensorfile import digest

# Environment variables by which libraries choose their kernels.
_VARIABLES = re.compile(
    r"ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)|MKL_(CBWR|ENABLE_INSTRUCTIONS)"
    r"|CUBLAS.*|NVIDIA_TF32_OVERRIDE|TORCH_(ALLOW_TF32|BLAS|CUBLAS|CUDNN).*"
)
_INSTRUCTIONS = re.compile(r"(avx|amx|fma|sve|asimd|bf16|i8mm)\w*")  # a processor's flags by which they do so
# Facts of ranks: those that are never compared, those whose difference is a warning, and those whose difference is one
# unless the run is to be deterministic. `gradient` proves whether kernels give the same bits; the others only hint.
_NOT_COMPARED = ("host", "gpu_id", "threads", "deterministic")  # the last two are keys of the spec as well
_WARNED = ("processor", "instructions", "variables", "machine")
_WARNED_UNLESS_DETERMINISTIC = ("device", "gpu", "cuda", "cudnn", "cublas")
_LABELS = {"data": "training images (data.root or data.target)", "test_data": "test images (data.root or data.target)"}


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
        if device.type == "cuda":
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # another value can mean other kernels
        if spec.train.compile:
            torch.use_deterministic_algorithms(True)
        else:  # the same, without importing torch.compile's modules, which takes most of a second
            torch.set_deterministic_debug_mode("error")
        # Every buffer is written before it is read, so filling them first would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    # What is computed in float32 has its 24 bits; cuDNN's default is TF32, which has 11. These names switch the newer
    # ones (fp32_precision) as well; with those alone, reading these is an error.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    threads, openmp = spec.train.cpu_threads or 1, ctypes.CDLL(None)
    if hasattr(openmp, "omp_set_dynamic"):  # kernels wait without end for threads that they do not get
        openmp.omp_set_dynamic(0)
        if (limit := openmp.omp_get_thread_limit()) < threads:
            raise RunFailedError(f"OMP_THREAD_LIMIT: {limit} is below train.cpu_threads: {threads}. HINT: unset it.")
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()


def describe_environment(spec: Spec, device: torch.device) -> dict[str, Any]:
    """Return all that the bits depend on beside the spec and the data."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    variables = sorted(f"{key}={value}" for key, value in os.environ.items() if _VARIABLES.fullmatch(key))
    return {
        "device": gpu.name if gpu else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": f"sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors" if gpu else None,
        "processor": None if gpu else processor_name(),
        "instructions": None if gpu else processor_instructions(),
        "variables": " ".join(variables),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cublas": cublas_version(str(torch.version.cuda)) if gpu else None,
        "threads": None if gpu else spec.train.cpu_threads or 1,
        "amp": resolve_amp(spec, device),
        "deterministic": spec.train.deterministic,
    }


def describe_rank(spec: Spec, device: torch.device) -> dict[str, Any]:
    """Return the facts of this rank that `require_agreement` compares and that are known before any data is read."""
    return {
        "host": socket.gethostname(),
        "gpu_id": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
        "code": digest({str(path.relative_to(PACKAGE)): path.read_bytes() for path in package_files()})[:16],
        **flatten(to_plain(spec)),
        **flatten({"machine": {**describe_machine(), "processor": None}}),  # processors are compared by `processor`
        **describe_environment(spec, device),
    }


def require_agreement(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Check that all ranks compute the same; return the differences that are worth a warning.

    Args:
        ranks: facts by rank, those of `describe_rank` and further ones.

    Raises:
        RanksDifferError: names what differs, the values, and the ranks and hosts.
    """
    gpus = _by_value(rank["gpu_id"] and f"{rank['gpu_id']} of {rank['host']}" for rank in ranks)
    for gpu, owners in gpus.items():
        if gpu != "None" and len(owners) > 1:
            raise RanksDifferError(
                f"{gpu} is the GPU of several ranks: {_who(owners, ranks)}. HINT: resources.tasks_per_node must not "
                "exceed resources.gpus_per_node, and train.device must not name a GPU."
            )
    warned = _WARNED if ranks[0]["deterministic"] else (*_WARNED, *_WARNED_UNLESS_DETERMINISTIC)
    fatal, minor = list[str](), list[str]()
    for key in dict.fromkeys(key for rank in ranks for key in rank if key not in _NOT_COMPARED):
        groups = _by_value(rank.get(key) for rank in ranks)
        if len(groups) > 1:
            words = ", ".join(f"{value[:80] or 'none'} on {_who(who, ranks)}" for value, who in groups.items())
            (minor if covered(key, warned) else fatal).append(f"{_LABELS.get(key, key)}: {words}")
    if fatal:
        raise RanksDifferError(
            f"the ranks do not agree. {'; '.join([*fatal, *minor][:6])}{'; and more' * (len(fatal) > 6)}. HINT: all "
            "need one job file, one installation, the same images, and one kind of hardware (--constraint)."
        )
    return minor


def combined(ranks: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Return facts of all ranks as one: where ranks differ, their different values joined by ` | `."""
    groups = {key: _by_value(rank[key] for rank in ranks) for key in keys}
    return {key: ranks[0][key] if len(found) == 1 else " | ".join(sorted(found)) for key, found in groups.items()}


def _by_value(values: Iterable[Any]) -> dict[str, list[int]]:
    """Return the ranks that have each value, in words; `values` are in the order of the ranks."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return groups


def _who(numbers: Sequence[int], ranks: Sequence[Mapping[str, Any]]) -> str:
    names = [f"rank {number} ({ranks[number]['host']})" for number in numbers]
    return " and ".join(names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"])


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
    return _first_of(("model name",), cpuinfo)


def processor_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the extensions of the first processor's instruction set that kernels are made for; None if unknown."""
    flags = _first_of(("flags", "Features"), cpuinfo)
    return flags and " ".join(sorted(flag for flag in flags.split() if _INSTRUCTIONS.fullmatch(flag)))


def _first_of(names: tuple[str, ...], cpuinfo: Path) -> str | None:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    fields = (line.partition(":") for line in lines)
    return next((text.strip() for name, _, text in fields if name.strip() in names and text.strip()), None)


def cublas_version(cuda: str) -> str | None:
    """Return the version of the cuBLAS that PyTorch has loaded; None if it cannot be asked."""
    with suppress(OSError, AttributeError):
        library, number = ctypes.CDLL(f"libcublas.so.{cuda.partition('.')[0]}"), ctypes.c_int()
        parts = [(library.cublasGetProperty(part, ctypes.byref(number)), number.value)[1] for part in range(3)]
        return ".".join(map(str, parts))
    return None


def peak_memory_bytes() -> int:
    """Most memory that this attempt has used so far: of the device, or of the process on a CPU."""
    if torch.cuda.is_initialized():  # one device; which one, other threads than the main one do not know
        with suppress(RuntimeError):  # of a device that has failed
            return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
