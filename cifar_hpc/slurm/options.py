"""Options of sbatch (sbatch(1)): those that are passed through or refused, forms of limits, variables left out."""

import re
from collections.abc import Iterable

from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown

# Options that would break submitting, resuming or requeueing, and what to use instead.
RESERVED = {
    "array": "a job file with a section sweep",
    "chdir": "the code snapshot, where jobs run,",
    "cpus-per-task": "--cpus-per-task",
    "dependency": "--dependency",
    **dict.fromkeys(("error", "open-mode", "output"), "logs/<run>/slurm"),
    "job-name": "--name",
    "no-requeue": "--no-requeue",
    "nodes": "--nodes",
    "ntasks": "--nodes and --ntasks-per-node",
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), "--ntasks-per-node"),
    **dict.fromkeys(("parsable", "quiet"), "--json"),
    "requeue": "resources.requeue",
    "signal": "resources.warning_seconds",
    "test-only": "--test-only",
    "time": "--time",
    "wait": "--follow",
    "workdir": "the code snapshot, where jobs run,",
    "wrap": "a job file",
}

# Variables of a shell that are not handed on to a job: a submission says the same wherever it is made. A variable that
# a job needs belongs into the site profile's `setup`.
_LEFT_OUT = re.compile(
    # Of another job, and options of Slurm's and submitit's programs, which would win over flags, job file and profile.
    r"_?SLURM_(?!CONF$|CONF_SERVER$|JWT$)|SLURMD_|(SBATCH|SRUN|SALLOC|SQUEUE|SCONTROL|SCANCEL|SINFO)_|SPANK_|SUBMITIT_"
    r"|_TEST_CLUSTER_$"
    # Ranks of another launcher: torchrun, MPI.
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$|TORCHELASTIC_|PMI[2X]?_|PALS_"
    r"|OMPI_COMM_WORLD_"
    # How Python and bash run; but not where packages are, how paths are decoded, or what changes no result.
    r"|PYTHON(?!_|(PATH|HOME|PLATLIBDIR|USERBASE|NOUSERSITE|UTF8|COERCECLOCALE)$|(UNBUFFERED|DONTWRITEBYTECODE)$)"
    r"|(SHELLOPTS|BASHOPTS|POSIXLY_CORRECT)$"
    # Kernels and threads, and with them the bits; not the choice of a library that conda makes.
    r"|(OMP|GOMP|OPENBLAS|ONEDNN|DNNL)_|KMP_(?!DUPLICATE_LIB_OK$)|MKL_(?!(THREADING|INTERFACE)_LAYER$)"
    r"|(ATEN_CPU_CAPABILITY|NVIDIA_TF32_OVERRIDE)$|CUBLAS(LT)?_|TORCH_(ALLOW_TF32|BLAS|CUBLAS|CUDNN)"
)
# The same, for a job on another machine: GPUs and folders of this one.
_OF_THIS_MACHINE = re.compile(
    r"(CUDA|NVIDIA|ROCR|HIP)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$|ZE_AFFINITY_MASK$|CUDA_MPS_|(TMPDIR|TMP|TEMP)$"
)


def left_out(environment: Iterable[str], here: bool = False) -> list[str]:
    """Names of the variables that a submission does not hand on to the job.

    Args:
        here: the job runs on this machine.
    """
    return sorted(v for v in environment if _LEFT_OUT.match(v) or not (here or _OF_THIS_MACHINE.match(v) is None))


# Options that would put the job where squeue does not show it, and what to use instead.
OUT_OF_SIGHT = {
    **dict.fromkeys(("cluster-constraint", "clusters"), "a login node of that cluster"),
    "uid": "that user's own account",
}


def check_option_names(names: Iterable[str]) -> None:
    """Check that each name is the long name of an sbatch option that may be passed through.

    Raises:
        SpecError: names the option, and what to use instead.
    """
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
            proper = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            hint = f" HINT: did you mean '{proper}'?" if re.fullmatch(r"[a-z][a-z0-9-]{0,40}", proper) else ""
            raise SpecError(
                f"resources.sbatch: the option {shown(name)} is not allowed; allowed: long names of sbatch's options, "
                f"of lower-case letters, digits and '-', such as mail-type.{hint}"
            )
        # sbatch accepts any beginning of a name, so --out would set --output.
        instead = RESERVED | OUT_OF_SIGHT
        reserved = [option for option in instead if option.startswith(name)]
        if reserved:
            option = name if name in reserved else reserved[0]
            short = "" if name == option else f" (it is short for {option})"
            why = "is set by cifar_hpc itself" if option in RESERVED else "would hide the job from status and cancel"
            raise SpecError(f"resources.sbatch.{name}: {why}{short}. HINT: use {instead[option]} instead.")


def check_dependency(text: str | None) -> None:
    """Check that a further dependency does not disable `singleton`, which keeps a run to one job at a time.

    Raises:
        SpecError: a '?' would make Slurm wait for any one of the dependencies, singleton among them.
    """
    if text is not None and "?" in text:
        raise SpecError(
            f"resources.dependency: {shown(text)} is not allowed; allowed: dependencies joined by ',' (all of them), "
            "since '?' (any one of them) would also disable the singleton that keeps a run to one job."
        )


_FORMS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, UNLIMITED"
_NUMBER = "([0-9]{1,9})"  # longer ones do not fit into Slurm's 32 bits
NO_LIMIT = 60 * (2**32 - 1)  # seconds; the largest number of minutes is Slurm's INFINITE


def parse_time(text: str, key: str = "--time") -> int:
    """Seconds in a Slurm time limit; NO_LIMIT for zero, too, as sbatch takes it.

    Raises:
        SpecError: for any other form.
    """
    if text.strip().upper() in ("UNLIMITED", "INFINITE", "-1"):
        return NO_LIMIT
    match = re.fullmatch(rf"(?:{_NUMBER}-)?{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?", text.strip())
    if match is None:
        raise SpecError(f"{key}: {shown(text)} is not allowed; allowed: {_FORMS}, such as 90 or 1-12:00:00.")
    days, first, second, third = match.groups()
    hours, minutes, seconds = (first, second, third) if days or third else (None, first, second)
    d, h, m, s = (int(number or 0) for number in (days, hours, minutes, seconds))
    return ((d * 24 + h) * 60 + m) * 60 + s or NO_LIMIT


def node_counts(text: str) -> tuple[int, int]:
    """(fewest, most) nodes of sbatch's --nodes: N, MIN-MAX, or from Slurm 23.02 on a list such as 1,4-16:4.

    Raises:
        SpecError: for any other form.
    """
    item = "([0-9]{1,6})(?:-([0-9]{1,6})(?::([0-9]{1,6}))?)?"
    found = re.findall(item, text) if re.fullmatch(f"{item}(,{item})*", text, re.ASCII) else [("0", "", "")]
    ranges = [(int(first), int(last or first), int(step or 1)) for first, last, step in found]
    if not all(1 <= first <= last and step >= 1 for first, last, step in ranges):
        raise SpecError(
            f"resources.nodes: {shown(text)} is not allowed; allowed: N, MIN-MAX, or a list that Slurm chooses from, "
            "such as 2, 1-4 or 1,2,4."
        )
    return min(first for first, _, _ in ranges), max(last - (last - first) % step for first, last, step in ranges)
