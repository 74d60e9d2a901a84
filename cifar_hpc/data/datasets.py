"""The images of a run: read once, then resident on the training device as uint8; and those that `evaluate` takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.config.spec import CLASSES, IMAGE_SIZE, DataSpec
from cifar_hpc.data import synthetic
from cifar_hpc.data.cifar10 import FOLDER, read_cifar10
from cifar_hpc.data.image_folder import class_folders, list_folder, list_split
from cifar_hpc.data.image_input import decode, open_images, read_image
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.files import DIRECTORY_MODE, read_regular, remove_leftovers, replacing, write_atomic
from cifar_hpc.randomness import Stream, mix, permutation
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import counted

SYNTHETIC_TRAIN_SIZE, SYNTHETIC_TEST_SIZE = 10_000, 2_000
# Files of a network file system take their time, but not one after the other. A thread takes several: to hand over each
# takes longer than to read it from a local disk.
_READERS, _READ_BY_EACH = 16, 32
_READ_AT_ONCE = _READERS * _READ_BY_EACH
SAY_SECONDS = 5.0  # between two lines that say how far it is
CIFAR10: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
UNKNOWN = tuple(f"class {label}" for label in range(CLASSES))
Progress = Callable[[str], bool]


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N], for training and test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    info: DatasetInfo = DatasetInfo(CIFAR10, IMAGE_SIZE)

    def to(self, device: torch.device) -> Dataset:
        """The same on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


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
        whole = _read_folder(spec, root, progress)
    else:
        sizes = spec.train_size or SYNTHETIC_TRAIN_SIZE, spec.test_size or SYNTHETIC_TEST_SIZE
        whole = Dataset(*synthetic.make_synthetic(*sizes))
    chosen = Dataset(
        *_choose(whole.train_images, whole.train_labels, spec.train_size, "data.train_size"),
        *_choose(whole.test_images, whole.test_labels, spec.test_size, "data.test_size"),
    )
    chosen = chosen if spec.holdout is None else _hold_out(chosen, spec.holdout)
    return replace(chosen, info=DatasetInfo(class_names(spec, root), spec.size))


def _choose(images: Tensor, labels: Tensor, size: int | None, key: str) -> tuple[Tensor, Tensor]:
    if size is None or size == len(images):
        return images, labels
    if size > len(images):
        raise SpecError(f"{key}: {size} is more than there are: {counted(len(images), 'image')}.")
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


def _read_folder(spec: DataSpec, root: Path, progress: Progress) -> Dataset:
    """Read the images of a folder that `spec` asks for, and no others: from a cache once they have been decoded."""
    folder, files, labels = root / spec.root, list[Path](), list[Tensor]()
    all_files, all_labels = list_folder(folder)
    for split, size in (("train", spec.train_size), ("test", spec.test_size)):
        every = torch.arange(len(all_files[split])), torch.tensor(all_labels[split])
        rows, chosen = _choose(*every, size, f"data.{split}_size")
        files += [all_files[split][row] for row in rows.tolist()]
        labels.append(chosen)
    stamp = _stamp(files)
    known = _cache_path(folder, root, f"known-{stamp[:32]}") if stamp else None
    digest = _recalled(known) or _read_images(files, progress, "comparing")[0]
    cache = _cache_path(folder, root, f"decoded-{digest[:16]}.pt")
    remove_leftovers(cache.parent)  # of processes that were killed while they wrote one
    images = None
    if os.path.lexists(cache):
        try:
            images = _read_cache(cache)
        except (BadFileError, OSError) as error:  # no reason to stop: it is only a cache
            progress(f"WARNING data cache {cache}: {error}; decoding again")
    if images is None:
        progress(f"decoding {len(files):,} images in {folder}, once: later starts read a cache")
        digest, decoded = _read_images(files, progress, "decoding")
        cache = _cache_path(folder, root, f"decoded-{digest[:16]}.pt")  # another one, if an image has changed since
        # In a file, each tensor has memory of its own (`tensorfile`).
        images = decoded[: len(labels[0])].clone(), decoded[len(labels[0]) :].clone()
        _keep_cache(cache, Dataset(images[0], labels[0], images[1], labels[1]), progress)
    if known is not None and not known.exists():
        with contextlib.suppress(OSError):  # the next start compares the content again
            known.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            write_atomic(known, digest.encode(), durable=False)
    return Dataset(images[0], labels[0], images[1], labels[1])


def _stamp(files: list[Path]) -> str | None:
    """sha256 of names, sizes, times and inodes, by which files are known as unchanged without reading them.

    tar, rsync and zip give other images the size and the time of the old ones, but nobody can set the time of the
    inode's change (ctime). A second change within that clock's resolution does not move it: so there is no stamp, None,
    while the last one was less than a minute ago, by a server's clock that may be off a little.
    """
    latest, began, few = time.time_ns() - 60 * 10**9, time.monotonic(), 1000
    try:
        stats = [*map(os.stat, files[:few])]
        with ThreadPoolExecutor(_READERS) as pool:  # only where a file takes its time: else threads take the longer
            each = pool.map if time.monotonic() - began > 0.1 else map
            stats += chain.from_iterable(each(lambda paths: [*map(os.stat, paths)], _shares(files[few:])))
    except OSError:
        return None  # reading will say why
    if any(status.st_ctime_ns > latest for status in stats):
        return None
    digest = hashlib.sha256()
    for path, status in zip(files, stats, strict=True):
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        digest.update(f"{_name(path)}\0{status.st_size} {times} {status.st_ino}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _recalled(known: Path | None) -> str | None:
    """The digest of the contents that had a stamp before."""
    with contextlib.suppress(OSError):
        text = read_regular(known).decode(errors="replace") if known is not None else ""
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
    return None


def _keep_cache(cache: Path, data: Dataset, progress: Progress) -> None:
    try:
        cache.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        with replacing(cache) as file:
            tensorfile.save(
                tensorfile.seal({**{name: getattr(data, name) for name in _TENSORS}, "name": cache.name}), file
            )
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        progress(f"WARNING data cache {cache} cannot be written ({error}); the next start decodes again")


def _cache_path(folder: Path, root: Path, name: str) -> Path:
    beside = folder / ".cifar_hpc"
    if os.path.exists(beside / name) or os.access(folder, os.W_OK, effective_ids=True):  # noqa: PTH110
        return beside / name
    return root / "checkpoints" / ".data" / name


def _read_cache(path: Path) -> tuple[Tensor, Tensor]:
    """The training and test images in a cache.

    Raises:
        BadFileError: it is damaged, or not the cache of this folder.
    """
    content = tensorfile.load(path)
    if not isinstance(content, dict) or content.get("name") != path.name or not content.keys() >= {*_TENSORS, "digest"}:
        raise BadFileError("not the decoded images of this folder")
    tensorfile.check_seal(content)
    return content["train_images"], content["test_images"]


def _read_images(files: list[Path], progress: Progress, doing: str) -> tuple[str, Tensor]:
    """(sha256 of names and contents, images; none unless `doing` is decoding).

    The content decides where there is no stamp, such as in a copy of the folder.
    """
    digest = hashlib.sha256(b"3")  # the version of the cache's format
    images = torch.empty(len(files) if doing == "decoding" else 0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    last_said = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(files), _READ_AT_ONCE):
            part = files[first : first + _READ_AT_ONCE]
            try:
                contents = [*chain.from_iterable(pool.map(lambda paths: [*map(read_image, paths)], _shares(part)))]
                if doing == "decoding":
                    images[first : first + len(part)] = decode(part, contents)
            except SpecError as error:
                raise SpecError(f"data.root: {error}") from None
            for path, content in zip(part, contents, strict=True):
                digest.update(f"{_name(path)}\0{len(content)}\n".encode(errors="surrogateescape") + content)
            text = ""
            if time.monotonic() - last_said > SAY_SECONDS:
                text = f"{doing} images: {first + len(part):,} of {len(files):,}"
                last_said = time.monotonic()
            if progress(text):
                raise Interrupted
    return digest.hexdigest(), images


def _shares(files: list[Path]) -> list[list[Path]]:
    """Parts of `files` for the threads."""
    return [files[first : first + _READ_BY_EACH] for first in range(0, len(files), _READ_BY_EACH)]


def _name(path: Path) -> str:
    """Split, class and file; `relative_to` would take as long as all the rest."""
    return "/".join(path.parts[-3:])


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
    """All test images of `folder`: CIFAR-10 as torchvision keeps it, or files in test/<class>/ or <class>/; or those of
    an array file or a CIFAR pickle with labels.

    Args:
        data: of the run; the labels follow the order of its classes.

    Raises:
        SpecError: it holds neither, or a file in it is wrong.
    """
    if not folder.exists():
        raise SpecError(f"--data: {folder} is no folder and no file.")
    if not folder.is_dir():
        found = open_images(folder)
        if found.labels is None:
            hint = f"HINT: python -m cifar_hpc predict RUN {folder} --out labels.csv"
            raise SpecError(
                f"--data: {folder} has no labels from 0 to {CLASSES - 1}, so no accuracy can be measured. {hint}"
            )
        whole = found.read(0, len(found.ids))
        return LabelledImages(whole, found.labels, class_names(data, root), f"in {folder}")
    cifar10 = folder.parent if folder.name == FOLDER else folder
    if (cifar10 / FOLDER).is_dir():
        ours = load_dataset(DataSpec(source="cifar10", root=str(cifar10.absolute())), root)
        images, labels, classes, source = ours.test_images, ours.test_labels, CIFAR10, f"CIFAR-10 in {cifar10}"
    else:
        split = folder / "test" if (folder / "test").is_dir() else folder
        if folder_classes(split) is None:
            raise SpecError(
                f"--data: {folder} holds no test images; allowed: a folder with {FOLDER}, with test/<class>/*, or with "
                "ten class folders."
            )
        files, numbers, folders = list_split(split, "--data")
        images, labels, classes, source = decode(files), torch.tensor(numbers), tuple(folders), str(split)
    labels, names, notes = match_classes(labels, classes, class_names(data, root))
    return LabelledImages(images, labels, names, source, notes)


def match_classes(
    labels: Tensor, classes: tuple[str, ...], known: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Labels of images in class folders as those of the run's classes: (labels, names, notes for the user).

    Args:
        classes: names of the folders, in the order of `labels`.
        known: of the run.
    """
    if sorted(classes) == sorted(known):  # matched by name
        return torch.tensor([known.index(name) for name in classes])[labels], known, ()
    note = (
        f"The classes there ({', '.join(classes)}) are not those of the run ({', '.join(known)}): they are "
        "matched by their order."
    )
    return labels, classes, (note,)
