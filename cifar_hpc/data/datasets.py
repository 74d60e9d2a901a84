"""The images of a run: read once, then resident on the training device as uint8; and those that `evaluate` takes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.config.spec import IMAGE_SIZE, DataSpec
from cifar_hpc.data import cifar
from cifar_hpc.data.image_folder import READERS, class_folders, decode, list_folder, list_split, pixels, read_image
from cifar_hpc.data.image_input import open_images
from cifar_hpc.data.info import CIFAR10, DatasetInfo
from cifar_hpc.data.sources import Progress, check_sizes, source_of
from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.files import DIRECTORY_MODE, read_regular, remove_leftovers, replacing, write_atomic
from cifar_hpc.randomness import Stream, mix, permutation
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import counted, shown

# A thread takes several files: to hand over each takes longer than to read it from a local disk. Fewer where each is
# resized, so that a signal to stop is noticed within seconds.
_READ_BY_EACH, _RESIZED_BY_EACH = 32, 4
SAY_SECONDS = 5.0  # between two lines that say how far it is
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
_PART = 2**22  # values that are measured at a time


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 3, S, S] and labels int64 [N], for training and test, and facts of them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    info: DatasetInfo = field(default=DatasetInfo(), kw_only=True)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The images and labels, by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def to(self, device: torch.device) -> Dataset:
        """The same on `device`."""
        return Dataset(*(tensor.to(device) for tensor in self.tensors.values()), info=self.info)


def load_dataset(
    spec: DataSpec, root: Path, progress: Progress = lambda text: False, user_code: Path | None = None
) -> Dataset:
    """Read the images that `spec` names.

    Args:
        root: the project's root; relative data.root start there.
        progress: called now and then with a line for the log, or an empty one; returns true to interrupt reading.
        user_code: the folder of the copies of the user's files, where data.target is in one.

    Raises:
        SpecError: names the file or folder that is missing or wrong.
        RunFailedError: the user's code fails.
        Interrupted: where `progress` returned true.
    """
    source = source_of(spec)
    whole = source.load(spec, root, progress, user_code)
    sizes = check_sizes(spec, len(whole.train_images), len(whole.test_images))
    train, train_labels = _choose(whole.train_images, whole.train_labels, sizes[0])
    test, test_labels = _choose(whole.test_images, whole.test_labels, sizes[1])
    info = dataclasses.replace(whole.info, image_size=spec.size)
    train, test = _resize(train, spec.size), _resize(test, spec.size)
    if source.measured:
        info = _measured(info, _statistics(train))
    chosen = Dataset(train, train_labels, test, test_labels, info=info)
    return chosen if spec.holdout is None else _hold_out(chosen, spec.holdout)


def _choose(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    if size == len(images):
        return images, labels
    rows = permutation(0, 0, len(images))[:size].sort().values
    return images[rows], labels[rows]


def _hold_out(data: Dataset, count: int) -> Dataset:
    """`count` training images in place of the test images; the same ones for every seed of a run."""
    order = permutation(mix(Stream.SPLIT), 0, len(data.train_images))
    kept, held = order[count:].sort().values, order[:count].sort().values
    images, labels = data.train_images, data.train_labels
    return Dataset(images[kept], labels[kept], images[held], labels[held], info=data.info)


def _resize(images: Tensor, size: int) -> Tensor:
    """Square images in another size, by Pillow as those of folders: the same bytes on every machine."""
    if images.shape[-1] == size:
        return images
    from PIL import Image

    def resized(image: Tensor) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)

    out = images.new_empty(len(images), 3, size, size)
    for number, image in enumerate(images):
        out[number] = resized(image)
    return out


def _statistics(images: Tensor) -> list[float]:
    """Mean and standard deviation of red, green and blue, six numbers, from sums of integers, which are exact."""
    sums, squares = [0, 0, 0], [0, 0, 0]
    for part in images.split(max(1, _PART // images[0].numel())):
        for channel, values in enumerate(part.transpose(0, 1)):
            counts = torch.bincount(values.flatten(), minlength=256).tolist()
            sums[channel] += sum(n * value for value, n in enumerate(counts))
            squares[channel] += sum(n * value**2 for value, n in enumerate(counts))
    count = images[:, 0].numel()
    spread = [math.sqrt(count * square - total**2) for total, square in zip(sums, squares, strict=True)]
    # A channel that is the same everywhere is not scaled.
    return [*(total / (255 * count) for total in sums), *(s / (255 * count) or 1.0 for s in spread)]


def _measured(info: DatasetInfo, statistics: Sequence[float]) -> DatasetInfo:
    red, green, blue, *deviations = statistics
    return dataclasses.replace(info, mean=(red, green, blue), std=(deviations[0], deviations[1], deviations[2]))


def read_folder(spec: DataSpec, root: Path, progress: Progress) -> Dataset:
    """Read the images of a folder that `spec` asks for, and no others: from a cache once they have been decoded."""
    folder, files, labels = root / spec.root, list[Path](), list[Tensor]()
    all_files, all_labels, classes = list_folder(folder, spec.holdout is not None)
    sizes = check_sizes(spec, len(all_files["train"]), len(all_files["test"]))
    for split, size in zip(("train", "test"), sizes, strict=True):
        every = torch.arange(len(all_files[split])), torch.tensor(all_labels[split], dtype=torch.int64)
        rows, chosen = _choose(*every, size)
        files += [all_files[split][row] for row in rows.tolist()]
        labels.append(chosen)
    stamp = _stamp(files, spec.image_size)
    known = _cache_path(folder, root, f"known-{stamp[:32]}") if stamp else None
    digest = _recalled(known) or ""
    if not digest and any(next(place.glob("decoded-*"), None) for place in _cache_folders(folder, root)):
        digest = _read_images(files, progress, spec.image_size)
    cache = _cache_path(folder, root, f"decoded-{digest[:16]}.pt")
    remove_leftovers(cache.parent)  # of processes that were killed while they wrote one
    content = None
    if digest and os.path.lexists(cache):
        try:
            content = _read_cache(cache)
        except (BadFileError, OSError) as error:  # no reason to stop: it is only a cache
            progress(f"WARNING data cache {cache}: {error}; decoding again")
    if content is None:
        progress(f"decoding {len(files):,} images in {folder}, once: later starts read a cache")
        # In a file, each tensor has memory of its own (`tensorfile`).
        train, test = (torch.empty(len(part), 3, spec.size, spec.size, dtype=torch.uint8) for part in labels)
        digest = _read_images(files, progress, spec.image_size, [*train, *test])
        cache = _cache_path(folder, root, f"decoded-{digest[:16]}.pt")  # another one, if an image has changed since
        tensors = zip(_TENSORS, (train, labels[0], test, labels[1]), strict=True)
        content = {**dict(tensors), "name": cache.name, "statistics": _statistics(train)}
        _keep_cache(cache, content, progress)
    if known is not None and not known.exists():
        with contextlib.suppress(OSError):  # the next start compares the content again
            known.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            write_atomic(known, digest.encode(), durable=False)
    info = DatasetInfo(classes)
    if classes != CIFAR10 or spec.size != IMAGE_SIZE:  # whose numbers runs of earlier versions have used
        info = _measured(info, content.get("statistics") or _statistics(content["train_images"]))
    return Dataset(content["train_images"], labels[0], content["test_images"], labels[1], info=info)


def _stamp(files: list[Path], size: int | None) -> str | None:
    """sha256 of names, sizes, times and inodes, by which files are known as unchanged without reading them.

    tar, rsync and zip give other images the size and the time of the old ones, but nobody can set the time of the
    inode's change (ctime). A second change within that clock's resolution does not move it: so there is no stamp, None,
    while the last one was less than a minute ago, by a server's clock that may be off a little.
    """
    latest, began, few = time.time_ns() - 60 * 10**9, time.monotonic(), 1000
    try:
        stats = [*map(os.stat, files[:few])]
        with ThreadPoolExecutor(READERS) as pool:  # only where a file takes its time: else threads take the longer
            each = pool.map if time.monotonic() - began > 0.1 else map
            stats += chain.from_iterable(
                each(lambda paths: [*map(os.stat, paths)], _shares(files[few:], _READ_BY_EACH))
            )
    except OSError:
        return None  # reading will say why
    if any(status.st_ctime_ns > latest for status in stats):
        return None
    digest = hashlib.sha256(b"" if size is None else b"%d\n" % size)
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


def _keep_cache(cache: Path, content: dict[str, Any], progress: Progress) -> None:
    try:
        cache.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        with replacing(cache) as file:
            tensorfile.save(tensorfile.seal(content), file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        progress(f"WARNING data cache {cache} cannot be written ({error}); the next start decodes again")


def _cache_folders(folder: Path, root: Path) -> tuple[Path, Path]:
    return folder / ".cifar_hpc", root / "checkpoints" / ".data"


def _cache_path(folder: Path, root: Path, name: str) -> Path:
    beside, elsewhere = _cache_folders(folder, root)
    if os.path.exists(beside / name) or os.access(folder, os.W_OK, effective_ids=True):  # noqa: PTH110
        return beside / name
    return elsewhere / name


def _read_cache(path: Path) -> dict[str, Any]:
    """The content of a cache.

    Raises:
        BadFileError: it is damaged, or not the cache of this folder.
    """
    content = tensorfile.load(path)
    if not isinstance(content, dict) or content.get("name") != path.name or not content.keys() >= {*_TENSORS, "digest"}:
        raise BadFileError("not the decoded images of this folder")
    tensorfile.check_seal(content)
    return content


def _read_images(files: list[Path], progress: Progress, size: int | None, images: Sequence[Tensor] = ()) -> str:
    """Digest of names and contents, which decide where there is no stamp, such as in a copy of the folder.

    Args:
        size: as `pixels`.
        images: takes the pixels of each file; without them, nothing is decoded.
    """

    def put(row: int, content: bytes) -> None:
        if images:
            images[row].copy_(torch.from_numpy(pixels(files[row], content, size)))

    def read(row: int) -> bytes:
        content = read_image(files[row], size)
        if size is None:
            return content
        put(row, content)
        return hashlib.sha256(content).digest()  # photographs are too many bytes to keep

    digest = hashlib.sha256(b"3" if size is None else b"3 %d\n" % size)  # the version of the cache's format
    last_said, doing = time.monotonic(), "decoding" if images else "comparing"
    each = _READ_BY_EACH if size is None else _RESIZED_BY_EACH
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(READERS) as pool:
        for part in _shares(range(len(files)), READERS * each):
            try:
                contents = [*chain.from_iterable(pool.map(lambda rows: [*map(read, rows)], _shares(part, each)))]
                for row, content in zip(part, contents, strict=True) if size is None else ():
                    put(row, content)  # small images take threads longer than they take one
            except SpecError as error:
                raise SpecError(f"data.root: {error}") from None
            for row, content in zip(part, contents, strict=True):
                digest.update(f"{_name(files[row])}\0{len(content)}\n".encode(errors="surrogateescape") + content)
            text = ""
            if time.monotonic() - last_said > SAY_SECONDS:
                text = f"{doing} images: {part[-1] + 1:,} of {len(files):,}"
                last_said = time.monotonic()
            if progress(text):
                raise Interrupted
    return digest.hexdigest()


def _shares(items: Sequence[Any], each: int) -> list[Any]:
    """Parts of `items` for the threads."""
    return [items[first : first + each] for first in range(0, len(items), each)]


def _name(path: Path) -> str:
    """Split, class and file; `relative_to` would take as long as all the rest."""
    return "/".join(path.parts[-3:])


@dataclass(frozen=True)
class LabelledImages:
    """Test images uint8 [N, 3, S, S], labels int64 [N], names of the classes, a description, notes for the user."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()


def own_images(data: DataSpec, root: Path, user_code: Path | None = None) -> LabelledImages:
    """The images that the run evaluates on.

    Raises:
        SpecError: they are not there.
    """
    found = load_dataset(data, root, user_code=user_code)
    held = ", held out of the training images" if data.holdout is not None else ""
    words = source_of(data).words(data, root) + held
    return LabelledImages(found.test_images, found.test_labels, found.info.classes, words)


def other_images(folder: Path, info: DatasetInfo, resize: bool) -> LabelledImages:
    """All test images of `folder`: CIFAR as torchvision keeps it, or files in test/<class>/ or <class>/; or those of an
    array file or a CIFAR pickle with labels.

    Args:
        info: of the run; the labels follow the order of its classes.
        resize: image files of other sizes than the run's are resized, as the run does.

    Raises:
        SpecError: it holds neither, or a file in it is wrong.
    """
    if not folder.exists():
        raise SpecError(f"--data: {folder} is no folder and no file.")
    if not folder.is_dir():
        found = open_images(folder, info, resize)
        if found.labels is None:
            hint = f"HINT: python -m cifar_hpc predict RUN {folder} --out labels.csv"
            last = len(info.classes) - 1
            raise SpecError(f"--data: {folder} has no labels from 0 to {last}, so no accuracy can be measured. {hint}")
        whole = found.read(0, len(found.ids))
        return LabelledImages(whole, found.labels, info.classes, f"in {folder}")
    above = folder.parent if folder.name in (known.folder for known in cifar.SETS.values()) else folder
    sets = [name for name, known in cifar.SETS.items() if (above / known.folder).is_dir()]
    if sets:  # both may be there: the one whose folder is named, or of the run's number of classes
        run = f"cifar{len(info.classes)}"
        name: Any = min(sets, key=lambda name: (cifar.SETS[name].folder != folder.name, name != run))
        size = None if info.image_size == IMAGE_SIZE else info.image_size
        ours = load_dataset(DataSpec(source=name, root=str(above.absolute()), image_size=size), above)
        images, labels, classes = ours.test_images, ours.test_labels, ours.info.classes
        source = f"{cifar.SETS[name].words} in {above}"
    else:
        split = folder / "test" if (folder / "test").is_dir() else folder
        if not class_folders(split):
            raise SpecError(
                f"--data: {folder} holds no test images; allowed: a folder with {cifar.SETS['cifar10'].folder} or "
                f"{cifar.SETS['cifar100'].folder}, with test/<class>/*, or with class folders."
            )
        files, numbers, folders = list_split(split, "--data")
        images, source = decode(files, info.image_size if resize else None), str(split)
        labels, classes = torch.tensor(numbers), tuple(folders)
    labels, names, notes = match_classes(labels, classes, info.classes)
    return LabelledImages(images, labels, names, source, notes)


def match_classes(
    labels: Tensor, classes: tuple[str, ...], known: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Labels of images in class folders as those of the run's classes: (labels, names, notes for the user).

    Args:
        classes: names of the folders, in the order of `labels`.
        known: of the run.

    Raises:
        SpecError: they are classes of other names, and another number of them.
    """
    if set(classes) <= set(known):  # matched by name
        return torch.tensor([known.index(name) for name in classes])[labels], known, ()
    if len(classes) != len(known):
        other = next(name for name in classes if name not in known)
        raise SpecError(
            f"--data: {counted(len(classes), 'class')}, of which {shown(other)} is none of the run's {len(known)} "
            f"({few(known)}). HINT: name the folders as the run's classes."
        )
    note = (
        f"The classes there ({few(classes)}) are not those of the run ({few(known)}): they are matched by their order."
    )
    return labels, classes, (note,)


def few(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
