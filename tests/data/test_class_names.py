"""What classes are called, also where their folder is gone."""

from __future__ import annotations

from pathlib import Path

from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data.info import CIFAR10, UNKNOWN
from cifar_hpc.data.sources import class_names
from cifar_hpc.data.synthetic import CLASSES


def test_each_source_has_its_names(tmp_path: Path) -> None:
    assert class_names(DataSpec(), tmp_path) == CIFAR10
    assert class_names(DataSpec(source="synthetic"), tmp_path) == CLASSES
    folder = DataSpec(source="folder", root="images")
    assert class_names(folder, tmp_path) == UNKNOWN
    for name in "jihgfedcba":
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
    (tmp_path / "images" / "test" / ".hidden").mkdir()
    (tmp_path / "images" / "test" / "file").touch()
    assert class_names(folder, tmp_path) == tuple("abcdefghij")
    (tmp_path / "images" / "train").mkdir()
    assert class_names(folder, tmp_path) == tuple("abcdefghij"), "train has none"
    (tmp_path / "flowers" / "rose").mkdir(parents=True)
    assert class_names(DataSpec(source="folder", root="flowers"), tmp_path) == UNKNOWN
    (tmp_path / "flowers" / "daisy").mkdir()
    assert class_names(DataSpec(source="folder", root="flowers"), tmp_path) == ("daisy", "rose")
    assert len(class_names(DataSpec(source="cifar100"), tmp_path)) == 100
