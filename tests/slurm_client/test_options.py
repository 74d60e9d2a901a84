"""Forms of sbatch's --time and --nodes, and the variables that no job gets."""

from __future__ import annotations

import pytest

from cifar_hpc.errors import SpecError
from cifar_hpc.slurm.options import NO_LIMIT, left_out, node_counts, parse_time

DAY = 86400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30 * 60),
        ("90", 90 * 60),
        ("0:30", 30),
        ("90:00", 90 * 60),
        ("5:07", 5 * 60 + 7),
        ("1:02:03", 3723),
        ("24:00:00", DAY),
        ("100:00:00", 100 * 3600),
        ("1-0", DAY),
        ("1-12", DAY + 12 * 3600),
        ("1-12:30", DAY + 12 * 3600 + 30 * 60),
        ("2-03:04:05", 2 * DAY + 3 * 3600 + 4 * 60 + 5),
        (" 10 ", 600),
    ],
)
def test_forms(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "x", "-5", "1.5", "1:2:3:4", "1-", "-1:00", "1-2-3", "1-2:3:4:5", "1:", ":30", "1h", "4 hours", "1e3"],
)
def test_bad_forms_name_the_key_and_the_forms(text: str) -> None:
    with pytest.raises(SpecError, match=r"^resources\.time: .* D-HH:MM:SS") as caught:
        parse_time(text, "resources.time")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "00:00", "0-00:00:00", "UNLIMITED", "unlimited", "INFINITE", "-1"])
def test_no_limit(text: str) -> None:
    assert parse_time(text) == NO_LIMIT


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("2", (2, 2)),
        ("1-4", (1, 4)),
        ("4-4", (4, 4)),
        ("1,3", (1, 3)),
        ("8,2-4", (2, 8)),
        ("1-15:4", (1, 13)),
        ("2-10:2,16", (2, 16)),
    ],
)
def test_node_counts(text: str, counts: tuple[int, int]) -> None:
    assert node_counts(text) == counts


@pytest.mark.parametrize("text", ["", "0", "3-1", "1-", "-4", "1,", "1-4:0", "1:2", "two", "²", "1 - 2", "1-2-3", "1k"])
def test_bad_node_counts_name_the_forms(text: str) -> None:
    with pytest.raises(SpecError, match=r"^resources\.nodes: .* MIN-MAX") as caught:
        node_counts(text)
    assert repr(text) in str(caught.value)


OUT = """
SLURM_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SLURM_MEM_PER_CPU SLURM_CPU_BIND SLURM_EXPORT_ENV SLURM_UMASK
SLURM_CLUSTERS SLURM_HINT SLURMD_NODENAME SLURM_RLIMIT_NOFILE SLURM_CONF_DIR _SLURM_SPANK_OPTION_pyxis_container_image
SBATCH_PARTITION SBATCH_WAIT SBATCH_SIGNAL SBATCH_ARRAY_INX SBATCH_EXPORT SRUN_CPUS_PER_TASK SALLOC_ACCOUNT
SQUEUE_FORMAT SCONTROL_ALL _TEST_CLUSTER_
SUBMITIT_PREEMPT_SIGNAL SUBMITIT_EXECUTOR RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_NAME MASTER_ADDR
MASTER_PORT TORCHELASTIC_RUN_ID PMI_RANK PMI2_X PMIX_RANK OMPI_COMM_WORLD_RANK PALS_RANKID PYTHONOPTIMIZE PYTHONINSPECT
PYTHONSAFEPATH PYTHONWARNINGS PYTHONIOENCODING PYTHONHASHSEED SHELLOPTS OMP_NUM_THREADS MKL_NUM_THREADS KMP_AFFINITY
MKL_CBWR ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY NVIDIA_TF32_OVERRIDE
CUBLAS_WORKSPACE_CONFIG TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT
"""
OF_THIS_MACHINE = "CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL CUDA_MPS_PIPE_DIRECTORY TMPDIR"
HANDED_ON = """
SLURM_CONF SLURM_CONF_SERVER SLURM_JWT PATH LD_LIBRARY_PATH HOME USER LANG LC_ALL PYTHONPATH PYTHONHOME PYTHONNOUSERSITE
PYTHONUNBUFFERED PYTHON_VERSION CONDA_PREFIX MKLROOT MKL_THREADING_LAYER KMP_DUPLICATE_LIB_OK NCCL_DEBUG HF_HOME
TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_HOME
https_proxy OMPI_MCA_btl CUDA_HOME CUDA_DEVICE_ORDER MODULEPATH BASH_ENV BASH_FUNC_module%% CIFAR_HPC_ROOT
WORLD_SIZES MY_RANK
"""


def test_what_is_left_out_of_the_environment_of_a_job() -> None:
    names = [*OUT.split(), *OF_THIS_MACHINE.split(), *HANDED_ON.split()]
    assert left_out(names, here=True) == sorted(OUT.split())
    assert left_out(names) == sorted([*OUT.split(), *OF_THIS_MACHINE.split()])
