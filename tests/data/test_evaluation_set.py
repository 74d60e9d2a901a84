"""Test images from elsewhere: what a folder is, and whose labels count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_files import write_classes

from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data import datasets
from cifar_hpc.data.datasets import Dataset, LabelledImages, load_dataset, own_images
from cifar_hpc.data.info import CIFAR10, DatasetInfo
from cifar_hpc.data.synthetic import CLASSES, make_synthetic
from cifar_hpc.errors import SpecError

SYNTHETIC = DataSpec(source="synthetic", train_size=100, test_size=20)


def other_images(folder: Path, classes: tuple[str, ...] = CLASSES) -> LabelledImages:
    return datasets.other_images(folder, DatasetInfo(classes), resize=False)


def test_the_runs_own_images_are_those_that_it_evaluates_on(tmp_path: Path) -> None:
    found, data = own_images(SYNTHETIC, tmp_path), load_dataset(SYNTHETIC, tmp_path)
    assert torch.equal(found.images, data.test_images) and torch.equal(found.labels, data.test_labels)
    assert (found.classes, found.source) == (CLASSES, "synthetic")
    held = own_images(DataSpec(source="synthetic", train_size=100, test_size=20, holdout=7), tmp_path)
    assert len(held.labels) == 7 and held.source == "synthetic, held out of the training images"


@pytest.mark.parametrize("below", ["test", "."])
def test_class_folders_of_the_same_names_have_the_runs_labels(tmp_path: Path, below: str) -> None:
    images = write_classes(tmp_path / below, CLASSES)
    found = other_images(tmp_path)
    _, _, _, labels = make_synthetic(100, 20)
    order = sorted(range(20), key=lambda n: (CLASSES[labels[n]], n))  # as the files sort, not as the labels do
    assert torch.equal(found.images, images[order]) and torch.equal(found.labels, labels[order])
    assert (found.classes, found.notes) == (CLASSES, ())


def test_other_class_names_are_taken_by_their_order_and_said(tmp_path: Path) -> None:
    write_classes(tmp_path, CIFAR10)
    found = other_images(tmp_path)
    assert found.classes == CIFAR10 and found.labels.tolist() == sorted(found.labels.tolist())
    assert "The classes there (airplane, automobile," in found.notes[0]


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar_10_is_known_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    asked = []

    def load(spec: DataSpec, root: Path) -> Dataset:
        asked.append(spec)
        return Dataset(*make_synthetic(10, 20), info=DatasetInfo(CIFAR10))

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "cifar-10-batches-py").mkdir()
    found = other_images(tmp_path / below, CIFAR10)
    assert asked == [DataSpec(source="cifar10", root=str(tmp_path))]
    assert (len(found.labels), found.classes, found.notes) == (20, CIFAR10, ())


def test_folders_without_test_images(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^--data: .*none is no folder"):
        other_images(tmp_path / "none")
    with pytest.raises(
        SpecError, match=r"^--data: .* holds no test images; allowed: a folder with cifar-10-batches-py"
    ):
        other_images(tmp_path)
    write_classes(tmp_path, CLASSES)
    next((tmp_path / "disc").iterdir()).write_bytes(b"x")
    with pytest.raises(SpecError, match="is not a readable image"):
        other_images(tmp_path)
