"""What a start says about its machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torchvision

from cifar_hpc.training.environment import describe_machine, processor_name


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
    assert processor_name(tmp_path / "cpuinfo") is None
    assert processor_name(tmp_path / "none") is None
