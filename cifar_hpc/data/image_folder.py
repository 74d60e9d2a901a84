"""The ImageFolder layout: train/<class>/* and test/<class>/*, checked without opening an image."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifar_hpc.config.spec import CLASSES
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.text import counted

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
# What such a file may hold, by Pillow's names: Pillow goes by the content, and knows formats that start programs (EPS).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")
# Images that nobody means to leave out, as any other file is.
_UNREADABLE = (".gif", ".tif", ".tiff", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".jp2", ".jpe", ".jfif")


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn what the system says about a file or folder into an error of data.root."""
    try:
        yield
    except OSError as error:
        raise SpecError(f"data.root: {error.filename} cannot be read: {error.strerror}.") from None


@_named_errors()
def list_split(folder: Path, key: str = "data.root") -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of one split; labels are the order of the class folders' names.

    Args:
        key: the key or option that names the folder, for messages.

    Raises:
        SpecError: where the folder, a class or an image is missing.
    """
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise SpecError(
            f"{key}: {folder} is no folder; a folder source needs train/<class>/* and test/<class>/*."
            + nearest(folder.name, siblings)
        )
    classes = class_folders(folder)
    if len(classes) != CLASSES:
        raise SpecError(f"{key}: {folder} has {counted(len(classes), 'class folder')}; allowed: {CLASSES}.")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = sorted(os.scandir(folder / name), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.lower().endswith(_UNREADABLE):
                raise SpecError(
                    f"{key}: {entry.path} is not read; allowed: {' '.join(IMAGE_SUFFIXES)}. HINT: convert it, or "
                    "move it away."
                )
        images = [entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise SpecError(f"{key}: {folder / name} holds no image ({' '.join(IMAGE_SUFFIXES)}).")
        for image in images:
            if not image.is_file():  # a FIFO would be waited for, a device read for ever
                raise SpecError(f"{key}: {image.path} is no regular file; allowed: image files, or links to them.")
        files += [Path(image.path) for image in images]
        labels += [label] * len(images)
    return files, labels, classes


@_named_errors()
def class_folders(folder: Path) -> list[str]:
    """The names of the class folders in `folder`, in the order of their labels.

    Raises:
        SpecError: it cannot be read.
    """
    return sorted(entry.name for entry in list(os.scandir(folder)) if entry.is_dir() and not entry.name.startswith("."))


def list_folder(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[int]]]:
    """Files and labels of both splits, {"train": ..., "test": ...}.

    Raises:
        SpecError: as `list_split`, and where the splits have other classes.
    """
    files, labels, classes = {}, {}, {}
    for split in ("train", "test"):
        files[split], labels[split], classes[split] = list_split(folder / split)
    if classes["train"] != classes["test"]:
        raise SpecError(
            f"data.root: {folder / 'test'} has the classes {classes['test']}, but train has {classes['train']}."
        )
    return files, labels
