"""What the ten classes of a run's images are called."""

from __future__ import annotations

from pathlib import Path

from cifar_hpc.image_folder import CLASSES
from cifar_hpc.spec import DataSpec

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
UNKNOWN = tuple(f"class {label}" for label in range(CLASSES))


def class_names(data: DataSpec, root: Path) -> tuple[str, ...]:
    """The names in the order of the labels; "class 0" and so on where a folder of images is not there any more.

    Args:
        root: the project's root; a relative data.root starts there.
    """
    if data.source == "cifar10":
        return CIFAR10
    if data.source == "synthetic":
        from cifar_hpc.synthetic import CLASSES as SYNTHETIC

        return SYNTHETIC
    return folder_classes(root / data.root / "train") or folder_classes(root / data.root / "test") or UNKNOWN


def folder_classes(folder: Path) -> tuple[str, ...] | None:
    """The names of the class folders in `folder`, in the order of their labels; None where it has not ten."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return None
    return tuple(names) if len(names) == CLASSES else None
