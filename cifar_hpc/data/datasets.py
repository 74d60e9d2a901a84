"""The images of a run: read once, then resident on the training device as uint8; and those that `evaluate` takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.config.spec import CLASSES, IMAGE_SIZE, DataSpec
from cifar_hpc.data import synthetic
from cifar_hpc.data.cifar10 import FOLDER, read_cifar10
from cifar_hpc.data.image_folder import class_folders, list_folder, list_split
from cifar_hpc.data.image_input import decode, read_image
from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.files import DIRECTORY_MODE, remove_leftovers, replacing
from cifar_hpc.randomness import Stream, mix, permutation
from cifar_hpc.tensorfile import BadFileError

SYNTHETIC_TRAIN_SIZE, SYNTHETIC_TEST_SIZE = 10_000, 2_000
# Files of a network file system take their time, but not one after the other. A thread takes several: to hand over each
# takes longer than to read it from a local disk.
_READERS, _READ_BY_EACH = 16, 32
_READ_AT_ONCE = _READERS * _READ_BY_EACH
CIFAR10: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
UNKNOWN = tuple(f"class {label}" for label in range(CLASSES))
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
        return Dataset(*(tensor.to(device) for tensor in vars(self).values()))


def load_dataset(spec: DataSpec, root: Path, progress: Progress = lambda text: False) -> Dataset:
    """Read the images that `spec` names.

    Args:
        root: the project's root; relative data.root start there.
        progress: called now and then with a line for the log, or an empty one; returns true to interrupt reading.

    Raises:
        SpecError: names the file or folder that is missing or wrong.
        Interrupted: where `progress` returned true.
    """
    if spec.source == "cifar10":
        whole = Dataset(*read_cifar10(root / spec.root))
    elif spec.source == "folder":
        whole = _read_folder(root / spec.root, root, progress)
    else:
        sizes = spec.train_size or SYNTHETIC_TRAIN_SIZE, spec.test_size or SYNTHETIC_TEST_SIZE
        whole = Dataset(*synthetic.make_synthetic(*sizes))
    chosen = Dataset(
        *_choose(whole.train_images, whole.train_labels, spec.train_size, "data.train_size"),
        *_choose(whole.test_images, whole.test_labels, spec.test_size, "data.test_size"),
    )
    return chosen if spec.holdout is None else _hold_out(chosen, spec.holdout)


def _choose(images: Tensor, labels: Tensor, size: int | None, key: str) -> tuple[Tensor, Tensor]:
    if size is None or size == len(images):
        return images, labels
    if size > len(images):
        raise SpecError(f"{key}: {size} is more than the {len(images)} images there are.")
    rows = permutation(0, 0, len(images))[:size].sort().values
    return images[rows], labels[rows]


def _hold_out(data: Dataset, count: int) -> Dataset:
    """`count` training images in place of the test images; the same ones for every seed of a run."""
    if count >= len(data.train_images):
        raise SpecError(
            f"data.holdout: {count} is not allowed; allowed: less than the {len(data.train_images)} training images."
        )
    order = permutation(mix(Stream.SPLIT), 0, len(data.train_images))
    kept, held = order[count:].sort().values, order[:count].sort().values
    return Dataset(data.train_images[kept], data.train_labels[kept], data.train_images[held], data.train_labels[held])


def _read_folder(folder: Path, root: Path, progress: Progress) -> Dataset:
    files, labels = list_folder(folder)
    both = files["train"] + files["test"]
    cache = _cache_path(folder, root, _read_images(both, progress, "reading")[0])
    remove_leftovers(cache.parent)  # of processes that were killed while they wrote one
    if os.path.lexists(cache):
        try:
            return _read_cache(cache)
        except (BadFileError, OSError) as error:  # no reason to stop: it is only a cache
            progress(f"WARNING data cache {cache}: {error}; decoding again")
    digest, images = _read_images(both, progress, "decoding")
    cache = _cache_path(folder, root, digest)  # which is another one where an image has changed since
    count = len(files["train"])
    # In a file, each tensor has memory of its own (`tensorfile`).
    train, test = images[:count].clone(), images[count:].clone()
    data = Dataset(train, torch.tensor(labels["train"]), test, torch.tensor(labels["test"]))
    try:
        cache.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        with replacing(cache) as file:
            tensorfile.save(tensorfile.seal({**vars(data), "name": cache.name}), file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        progress(f"WARNING data cache {cache} cannot be written ({error}); the next start decodes again")
    return data


def _cache_path(folder: Path, root: Path, digest: str) -> Path:
    name = f"decoded-{digest[:16]}.pt"
    beside = folder / ".cifar_hpc"
    if os.path.exists(beside / name) or os.access(folder, os.W_OK, effective_ids=True):  # noqa: PTH110
        return beside / name
    return root / "checkpoints" / ".data" / name


def _read_cache(path: Path) -> Dataset:
    """The images in a cache.

    Raises:
        BadFileError: it is damaged, or not the cache of this folder.
    """
    content = tensorfile.load(path)
    names = [field.name for field in fields(Dataset)]
    if not isinstance(content, dict) or content.get("name") != path.name or not content.keys() >= {*names, "digest"}:
        raise BadFileError("not the decoded images of this folder")
    tensorfile.check_seal(content)
    return Dataset(*(content[name] for name in names))


def _read_images(files: list[Path], progress: Progress, doing: str) -> tuple[str, Tensor]:
    """(sha256 of names and contents, images; none unless `doing` is decoding).

    The content decides: tar, rsync and zip give other images the time of the old ones. Reading 50,000 takes a second.
    """
    digest = hashlib.sha256(b"3")  # the version of the cache's format
    images = torch.empty(len(files) if doing == "decoding" else 0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    last_said = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(files), _READ_AT_ONCE):
            part = files[first : first + _READ_AT_ONCE]
            shares = [part[n : n + _READ_BY_EACH] for n in range(0, len(part), _READ_BY_EACH)]
            try:
                contents = list(chain.from_iterable(pool.map(lambda paths: [*map(read_image, paths)], shares)))
                if doing == "decoding":
                    images[first : first + len(part)] = decode(part, contents)
            except SpecError as error:
                raise SpecError(f"data.root: {error}") from None
            for path, content in zip(part, contents, strict=True):
                name = "/".join(path.parts[-3:])  # split, class, file; `relative_to` would take as long as all the rest
                digest.update(f"{name}\0{len(content)}\n".encode(errors="surrogateescape") + content)
            text = ""
            if time.monotonic() - last_said > 10:
                text = f"{doing} images: {first + len(part)} of {len(files)} in {part[0].parent.parent}"
                last_said = time.monotonic()
            if progress(text):
                raise Interrupted
    return digest.hexdigest(), images


def class_names(data: DataSpec, root: Path) -> tuple[str, ...]:
    """The names in the order of the labels; "class 0" and so on where a folder of images no longer exists.

    Args:
        root: the project's root; a relative data.root starts there.
    """
    if data.source == "cifar10":
        return CIFAR10
    if data.source == "synthetic":
        return synthetic.CLASSES
    return folder_classes(root / data.root / "train") or folder_classes(root / data.root / "test") or UNKNOWN


def folder_classes(folder: Path) -> tuple[str, ...] | None:
    """The names of the class folders in `folder`, in the order of their labels; None where it has not ten."""
    with contextlib.suppress(SpecError):
        names = class_folders(folder)
        return tuple(names) if len(names) == CLASSES else None
    return None


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
    cifar10 = folder.parent if folder.name == FOLDER else folder
    if (cifar10 / FOLDER).is_dir():
        found = load_dataset(DataSpec(source="cifar10", root=str(cifar10.absolute())), root)
        images, labels, classes, source = found.test_images, found.test_labels, CIFAR10, f"CIFAR-10 in {cifar10}"
    else:
        split = folder / "test" if (folder / "test").is_dir() else folder
        if folder_classes(split) is None:
            raise SpecError(
                f"--data: {folder} holds no test images; allowed: a folder with {FOLDER}, with test/<class>/*, or with "
                "ten class folders."
            )
        files, numbers, names = list_split(split)
        images, labels, classes, source = decode(files), torch.tensor(numbers), tuple(names), str(split)
    known = class_names(data, root)
    if sorted(classes) == sorted(known):  # matched by name
        order = torch.tensor([known.index(name) for name in classes])
        return LabelledImages(images, order[labels], known, source)
    note = (
        f"The classes there ({', '.join(classes)}) are not those of the run ({', '.join(known)}): they are "
        "matched by their order."
    )
    return LabelledImages(images, labels, classes, source, (note,))
