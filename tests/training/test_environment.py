"""What a start says about its machine, and what it refuses where the machines of its ranks differ."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from helpers import CPU, PROJECT, tiny_spec

from cifar_hpc.errors import RanksDifferError
from cifar_hpc.training.environment import (
    combined,
    configure_torch,
    cublas_version,
    describe_environment,
    describe_machine,
    describe_rank,
    processor_instructions,
    processor_name,
    require_agreement,
)


def test_versions_are_those_that_are_imported() -> None:
    found = describe_machine()
    assert torchvision.__version__.partition("+")[0] == found["torchvision"].partition("+")[0]
    assert found["python"] == platform.python_version()


def test_the_name_of_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: \nmodel name\t: A Fast One @ 3: GHz\nflags\t: fpu\n")
    assert processor_name(file) == "A Fast One @ 3: GHz"


def test_no_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"Hardware : \xff\n")  # as on some ARM machines
    for file in (tmp_path / "cpuinfo", tmp_path / "none"):
        assert processor_name(file) is None and processor_instructions(file) is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx512_bf16 sse amx_tile avx2 fma", "amx_tile avx2 avx512_bf16 fma"),
        ("Features\t: fp asimd sve2 bf16 aes", "asimd bf16 sve2"),  # ARM
    ],
)
def test_instructions_that_kernels_are_made_for(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\nflags\t: other\n")
    assert processor_instructions(tmp_path / "cpuinfo") == found


def test_the_environment_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "ONEDNN_VERBOSE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "x")
    found = describe_environment(tiny_spec(), CPU)
    # The number of threads is set outright, so its variable decides nothing.
    assert found["variables"] == "MKL_CBWR=x ONEDNN_MAX_CPU_ISA=x"
    assert (found["processor"], found["instructions"]) == (processor_name(), processor_instructions())
    assert found["gpu"] is found["cublas"] is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, as far as its description goes."""
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    return torch.device("cuda", 1)


def test_the_environment_of_a_gpu(gpu: torch.device) -> None:
    found = describe_rank(tiny_spec(), gpu)
    assert (found["device"], found["gpu"], found["gpu_id"]) == ("H100", "sm_90, 132 multiprocessors", "1234")
    assert (found["processor"], found["instructions"], found["variables"]) == (
        None,
        None,
        "CUBLAS_WORKSPACE_CONFIG=:16:8",
    )


@pytest.mark.parametrize(("deterministic", "workspace"), [(True, ":4096:8"), (False, ":16:8")])
def test_the_workspace_of_cublas_is_not_left_to_the_surroundings(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, deterministic: bool, workspace: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    configure_torch(tiny_spec(train={"deterministic": deterministic}), gpu)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == workspace


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_float32_is_not_shortened_to_tf32(amp: str) -> None:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    cuda.allow_tf32 = cudnn.allow_tf32 = True  # as by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and by default
    assert (cuda.fp32_precision, cudnn.conv.fp32_precision) == ("tf32", "tf32")
    configure_torch(tiny_spec(train={"amp": amp}), CPU)
    assert not cuda.allow_tf32 and not cudnn.allow_tf32  # as torch.compile reads them
    assert "tf32" not in (cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)


def test_the_version_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_property(part: int, value: Any) -> int:
        value._obj.value = (13, 0, 2)[part]
        return 0

    loaded = []
    library = SimpleNamespace(cublasGetProperty=get_property)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded.append(name) or library)  # type: ignore[func-returns-value]
    assert (cublas_version("13.0"), loaded) == ("13.0.2", ["libcublas.so.13"])
    monkeypatch.undo()
    assert cublas_version("99.1") is None


# ------------------------------------------------------------------------------------------- ranks


def ranks(*differing: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of so many ranks on hosts a, b, c ..., all alike but for these."""
    alike = describe_rank(tiny_spec(), CPU)
    return [alike | {"host": "abcdefgh"[rank]} | facts for rank, facts in enumerate(differing)]


def refusal(*differing: dict[str, Any]) -> str:
    with pytest.raises(RanksDifferError) as caught:
        require_agreement(ranks(*differing))
    assert caught.value.retryable and caught.value.everywhere and caught.value.exit_code == 1
    return str(caught.value)


def test_ranks_that_are_alike() -> None:
    assert require_agreement(ranks({}, {}, {})) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"train.epochs": 3}, "train.epochs: 2 on rank 0 (a), 3 on rank 1 (b)."),
        ({"data.root": "/x"}, "data.root: data on rank 0 (a), /x on rank 1 (b)."),
        ({"code": "0123456789abcdef"}, ", 0123456789abcdef on rank 1 (b)."),
        ({"torch": "2.11.0"}, ", 2.11.0 on rank 1 (b)."),
        ({"device": "x86_64 AVX2"}, ", x86_64 AVX2 on rank 1 (b)."),
        ({"gpu": "sm_90, 66 multiprocessors"}, "gpu: None on rank 0 (a), sm_90, 66 multiprocessors on rank 1 (b)."),
        ({"amp": "bf16"}, "amp: fp32 on rank 0 (a), bf16 on rank 1 (b)."),
        ({"gradient": "0" * 16}, "gradient: None on rank 0 (a), 0000000000000000 on rank 1 (b)."),
        (
            {"data": "1" * 64},
            f"training images (data.root or data.target): None on rank 0 (a), {'1' * 64} on rank 1 (b).",
        ),
        (
            {"test_data": "1" * 64},
            f"test images (data.root or data.target): None on rank 0 (a), {'1' * 64} on rank 1 (b).",
        ),
    ],
)
def test_what_ranks_must_agree_on(facts: dict[str, Any], words: str) -> None:
    message = refusal({}, facts)
    assert f"{words} HINT: " in message, message


def test_a_refusal_names_what_may_be_the_reason() -> None:
    message = refusal({"gradient": "1"}, {"gradient": "2", "variables": "MKL_CBWR=AVX2"})
    assert "gradient: 1 on rank 0 (a), 2 on rank 1 (b); variables: none on rank 0 (a), MKL_CBWR=AVX2" in message


def test_a_refusal_stays_short() -> None:
    message = refusal(*[{}] * 5, {"torch": "2.11.0"}, {f"key.{number}": "x" * 1000 for number in range(50)})
    assert "rank 0 (a) and rank 1 (b) and rank 2 (c) and 3 more" in message
    assert "; and more. HINT:" in message and len(message) < 2000


@pytest.mark.parametrize("key", ["processor", "instructions", "variables", "machine.python", "machine.torchvision"])
def test_what_ranks_may_differ_in(key: str) -> None:
    (warning,) = require_agreement(ranks({}, {key: "other"}))
    assert key in warning and "other on rank 1 (b)" in warning


def test_hardware_may_differ_where_bits_are_not_promised() -> None:
    facts = {"deterministic": False, "train.deterministic": False}
    assert len(require_agreement(ranks(facts, facts | {"gpu": "another", "device": "another"}))) == 2
    with pytest.raises(RanksDifferError, match=r"torch: .* on rank 1 \(b\)"):
        require_agreement(ranks(facts, facts | {"torch": "another"}))


def test_facts_of_all_ranks_as_one() -> None:
    facts = [{"processor": "B", "threads": 2}, {"processor": "A", "threads": 2}, {"processor": "B", "threads": 2}]
    assert combined(facts, ("processor", "threads")) == {"processor": "A | B", "threads": 2}


def configured(**variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that computes with two threads under these variables, which are read when it starts."""
    code = (
        "import torch; from helpers import *; configure_torch(tiny_spec(train={'cpu_threads': 2}), CPU); "
        "print(torch.nn.functional.conv2d(torch.ones(8, 64, 32, 32), torch.ones(64, 64, 3, 3)).sum().item())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=100,
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"} | variables,
    )  # fmt: skip


@pytest.mark.process
def test_variables_that_would_keep_threads_from_a_kernel_that_waits_for_them() -> None:
    assert float(configured(OMP_DYNAMIC="true").stdout) == 8 * 64 * 30 * 30 * 576
    refused = configured(OMP_THREAD_LIMIT="1")
    assert "OMP_THREAD_LIMIT: 1 is below train.cpu_threads: 2." in refused.stderr
