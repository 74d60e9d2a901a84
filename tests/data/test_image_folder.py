"""Folders of images with odd things in them: named, and neither waited for nor stumbled over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cifar_hpc.config.spec import CLASSES, DataSpec
from cifar_hpc.data.datasets import load_dataset
from cifar_hpc.data.image_folder import list_folder
from cifar_hpc.errors import SpecError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image of each class in either split."""
    image = Image.new("RGB", (32, 32))
    for split in ("train", "test"):
        for label in range(CLASSES):
            directory = tmp_path / split / f"class {label}"
            directory.mkdir(parents=True)
            image.save(directory / "a.png")
    return tmp_path


def to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, to_nothing, to_a_device])
def test_an_image_is_a_regular_file(folder: Path, plant: Callable[[Path], None]) -> None:
    plant(folder / "train" / "class 3" / "b.png")
    with pytest.raises(SpecError, match=r"^data\.root: .*class 3/b\.png is no regular file"):
        list_folder(folder)


def test_a_link_to_an_image_is_one(folder: Path) -> None:
    (folder / "train" / "class 3" / "b.png").symlink_to("a.png")
    files, labels, _ = list_folder(folder)
    assert len(files["train"]) == CLASSES + 1 and labels["train"].count(3) == 2


def test_a_name_that_is_not_utf8_is_a_name(folder: Path) -> None:
    directory = os.fsencode(folder / "train" / "class 3")
    os.rename(os.path.join(directory, b"a.png"), os.path.join(directory, b"caf\xe9 $(touch x).png"))  # noqa: PTH104, PTH118
    data = load_dataset(DataSpec(source="folder", root=str(folder)), folder)
    assert len(data.train_images) == CLASSES
