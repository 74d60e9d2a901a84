"""The images that `evaluate` measures on: the run's own test set, or that of another folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data.cifar10 import FOLDER
from cifar_hpc.data.datasets import CIFAR10, class_names, folder_classes, load_dataset
from cifar_hpc.data.image_folder import list_split
from cifar_hpc.data.image_input import decode
from cifar_hpc.errors import SpecError


@dataclass(frozen=True)
class LabelledImages:
    """Test images uint8 [N, 3, 32, 32], labels int64 [N], names of the classes, a description, notes for the user."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()


def own_images(data: DataSpec, root: Path) -> LabelledImages:
    """The images that the run evaluates on.

    Raises:
        SpecError: they are not there.
    """
    found = load_dataset(data, root)
    what = {"cifar10": f"CIFAR-10 in {root / data.root}", "folder": str(root / data.root), "synthetic": "synthetic"}
    held = ", held out of the training images" if data.holdout is not None else ""
    return LabelledImages(found.test_images, found.test_labels, class_names(data, root), what[data.source] + held)


def other_images(folder: Path, data: DataSpec, root: Path) -> LabelledImages:
    """All test images of `folder`: CIFAR-10 as torchvision keeps it, or files in test/<class>/ or <class>/.

    Args:
        data: of the run; the labels follow the order of its classes.

    Raises:
        SpecError: it holds neither, or a file in it is wrong.
    """
    if not folder.is_dir():
        raise SpecError(f"--data: {folder} is no folder.")
    known = class_names(data, root)
    cifar10 = folder if (folder / FOLDER).is_dir() else folder.parent if folder.name == FOLDER else None
    if cifar10 is not None:
        found = load_dataset(DataSpec(source="cifar10", root=str(cifar10.absolute())), root)
        images = LabelledImages(found.test_images, found.test_labels, CIFAR10, f"CIFAR-10 in {cifar10}")
        return _in_order(images, known)
    split = folder / "test" if (folder / "test").is_dir() else folder
    if folder_classes(split) is None:
        raise SpecError(
            f"--data: {folder} holds no test images; allowed: a folder with {FOLDER}, with test/<class>/*, or with "
            "ten class folders."
        )
    files, labels, classes = list_split(split)
    return _in_order(LabelledImages(decode(files), torch.tensor(labels), tuple(classes), str(split)), known)


def _in_order(found: LabelledImages, known: tuple[str, ...]) -> LabelledImages:
    """Labels in the order of the run's classes: matched by name where the names are the same, else by position."""
    if sorted(found.classes) == sorted(known):
        order = torch.tensor([known.index(name) for name in found.classes])
        return replace(found, labels=order[found.labels], classes=known)
    note = (
        f"The classes there ({', '.join(found.classes)}) are not those of the run ({', '.join(known)}): they are "
        "matched by their order."
    )
    return replace(found, notes=(note,))
