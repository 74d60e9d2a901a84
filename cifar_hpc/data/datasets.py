"""The images of a run: read once, then resident on the training device as uint8."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.config.spec import CLASSES, DataSpec
from cifar_hpc.data.cifar10 import read_cifar10
from cifar_hpc.data.image_folder import IMAGE_FORMATS, list_folder
from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.files import DIRECTORY_MODE, remove_leftovers, replacing
from cifar_hpc.randomness import Stream, mix, permutation
from cifar_hpc.tensorfile import BadFileError

SYNTHETIC_TRAIN_SIZE, SYNTHETIC_TEST_SIZE = 10_000, 2_000
Progress = Callable[[str], bool]


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N], for training and test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Dataset:
        """The same on `device`."""
        return Dataset(
            *(t.to(device) for t in (self.train_images, self.train_labels, self.test_images, self.test_labels))
        )


def load_dataset(spec: DataSpec, root: Path, progress: Progress = lambda text: False) -> Dataset:
    """Read the images that `spec` names.

    Args:
        root: the project's root; relative data.root start there.
        progress: called with a line of text now and then; if it returns true, reading is left.

    Raises:
        SpecError: names the file or folder that is missing or wrong.
        Interrupted: where `progress` said so.
    """
    if spec.source == "synthetic":
        from cifar_hpc.data.synthetic import make_synthetic

        made = make_synthetic(spec.train_size or SYNTHETIC_TRAIN_SIZE, spec.test_size or SYNTHETIC_TEST_SIZE)
        return _hold_out(Dataset(*made), spec.holdout)
    folder = root / spec.root
    whole = Dataset(*read_cifar10(folder)) if spec.source == "cifar10" else _read_folder(folder, root, progress)
    chosen = Dataset(
        *_choose(whole.train_images, whole.train_labels, spec.train_size, "data.train_size"),
        *_choose(whole.test_images, whole.test_labels, spec.test_size, "data.test_size"),
    )
    return _hold_out(chosen, spec.holdout)


def _hold_out(data: Dataset, count: int | None) -> Dataset:
    """`count` training images in place of the test images; the same ones for every seed of a run."""
    if count is None:
        return data
    if count >= len(data.train_images):
        raise SpecError(
            f"data.holdout: {count} is not allowed; allowed: less than the {len(data.train_images)} training images."
        )
    order = permutation(mix(Stream.SPLIT), 0, len(data.train_images))
    kept, held = order[count:].sort().values, order[:count].sort().values
    return Dataset(data.train_images[kept], data.train_labels[kept], data.train_images[held], data.train_labels[held])


def _choose(images: Tensor, labels: Tensor, size: int | None, key: str) -> tuple[Tensor, Tensor]:
    if size is None:
        return images, labels
    if size > len(images):
        raise SpecError(f"{key}: {size} is more than the {len(images)} images there are.")
    rows = permutation(0, 0, len(images))[:size].sort().values
    return images[rows], labels[rows]


def _read_folder(folder: Path, root: Path, progress: Progress) -> Dataset:
    files, labels = list_folder(folder)
    cache = _cache_path(folder, root, files)
    remove_leftovers(cache.parent)  # of processes that were killed while they wrote one
    if os.path.lexists(cache):
        try:
            return _read_cache(cache)
        except (BadFileError, OSError) as error:  # no reason to stop: it is only a cache
            progress(f"WARNING data cache {cache}: {error}; decoding again")
    tensors: dict[str, Any] = {}
    for split in ("train", "test"):
        tensors[f"{split}_images"] = _decode(files[split], progress)
        tensors[f"{split}_labels"] = torch.tensor(labels[split])
    _write_cache(cache, tensors, progress)
    return Dataset(**tensors)


def _cache_path(folder: Path, root: Path, files: dict[str, list[Path]]) -> Path:
    digest = hashlib.sha256(b"2")  # the version of the cache's format
    for paths in files.values():
        for path in paths:
            status = path.stat()
            name = "/".join(path.parts[-3:])  # split, class, file; `relative_to` would take as long as all the rest
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    name = f"decoded-{digest.hexdigest()[:16]}.pt"
    beside = folder / ".cifar_hpc"
    if (beside / name).exists() or os.access(folder, os.W_OK):
        return beside / name
    return root / "checkpoints" / ".data" / name


def _read_cache(path: Path) -> Dataset:
    """What `_write_cache` wrote, to the last bit.

    Raises:
        BadFileError: it is something else.
    """
    content = tensorfile.load(path)
    names = [field.name for field in fields(Dataset)]
    if not isinstance(content, dict) or content.get("name") != path.name or not content.keys() >= {*names, "digest"}:
        raise BadFileError("not the decoded images of this folder")
    tensorfile.check_seal(content)
    return Dataset(*(content[name] for name in names))


def _decode(files: list[Path], progress: Progress) -> Tensor:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    images = torch.empty(len(files), 3, 32, 32, dtype=torch.uint8)
    said = time.monotonic()
    for number, path in enumerate(files):
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # PIL has many
            raise SpecError(f"data.root: {path} is not a readable image: {error}.") from None
        if image.size != (32, 32):
            raise SpecError(
                f"data.root: {path} is {image.size[0]}x{image.size[1]} pixels; allowed: 32x32. "
                "HINT: resize the images first."
            )
        images[number] = pil_to_tensor(image)
        if number % 500 == 0:
            text = ""
            if time.monotonic() - said > 10:
                text, said = f"decoding images: {number} of {len(files)} in {path.parent.parent}", time.monotonic()
            if progress(text):
                raise Interrupted
    return images


def _write_cache(path: Path, tensors: dict[str, Any], progress: Progress) -> None:
    try:
        path.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        with replacing(path) as file:
            tensorfile.save(tensorfile.seal({**tensors, "name": path.name}), file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        progress(f"WARNING data cache {path} cannot be written ({error}); the next start decodes again")


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
        from cifar_hpc.data.synthetic import CLASSES as SYNTHETIC

        return SYNTHETIC
    return folder_classes(root / data.root / "train") or folder_classes(root / data.root / "test") or UNKNOWN


def folder_classes(folder: Path) -> tuple[str, ...] | None:
    """The names of the class folders in `folder`, in the order of their labels; None where it has not ten."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return None
    return tuple(names) if len(names) == CLASSES else None
