"""Image files: the ImageFolder layout, checked without opening an image; sizes from headers; pixels.

The submitting process imports this file, so torch, numpy and Pillow are imported where pixels are decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.config.spec import IMAGE_SIZE, LARGEST_SIZE, LEAST_SIZE
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.files import open_regular
from cifar_hpc.text import counted, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image as Picture
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
# What such a file may hold, by Pillow's names: Pillow goes by the content, and knows formats that start programs (EPS).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")
# Images that nobody means to leave out, as any other file is.
_UNREADABLE = (".gif", ".tif", ".tiff", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".jp2", ".jpe", ".jfif")
LARGEST_IMAGE = 2**22  # bytes of a file of 32x32 pixels, nearly all of them comments
LARGEST_PHOTO = 2**27  # bytes of a file that is resized
LARGEST_PIXELS = 2**26  # of an image that is resized, which take 3 bytes each; JPEG files are reduced as they are read
READERS = 16  # threads: files of a network file system take their time, but not one after the other
_RESIZE = " HINT: --set data.image_size=64 resizes all images of a run to 64x64; predict has --resize."


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
        missing = folder if folder.parent.is_dir() else folder.parent
        siblings = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
        raise SpecError(
            f"{key}: {missing} is no folder; a folder source needs train/<class>/* and test/<class>/*, or "
            f"data.holdout and <class>/*.{nearest(missing.name, siblings)}"
        )
    classes = class_folders(folder)
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


@_named_errors()
def list_folder(
    folder: Path, holdout: bool = False
) -> tuple[dict[str, list[Path]], dict[str, list[int]], tuple[str, ...]]:
    """Files and labels of both splits, {"train": ..., "test": ...}, and the names of the classes.

    Args:
        holdout: training images are held out for the test, so class folders without splits, or without test/, will do.

    Raises:
        SpecError: as `list_split`, and where the splits have other classes, or fewer than two.
    """
    train, test, hint = folder / "train", folder / "test", " HINT: data.holdout=N tests on N of the training images."
    if folder.is_dir() and not train.exists() and not test.exists() and _holds_classes(folder):
        if not holdout:
            raise SpecError(f"data.root: {folder} has class folders, but no train/ and test/ above them.{hint}")
        train = folder
    files, labels, classes = list_split(train)
    if len(classes) < 2:
        raise SpecError(f"data.root: {train} has {counted(len(classes), 'class folder')}; allowed: 2 or more.")
    if holdout and not test.exists():
        return {"train": files, "test": []}, {"train": labels, "test": []}, tuple(classes)
    try:
        test_files, test_labels, test_classes = list_split(test)
    except SpecError as error:
        raise SpecError(f"{error}{'' if test.exists() else hint}") from None
    if classes != test_classes:
        only = {"train": {*classes} - {*test_classes}, "test": {*test_classes} - {*classes}}
        words = [f"only in {split}: {', '.join(sorted(names)[:5])}" for split, names in only.items() if names]
        raise SpecError(f"data.root: the folders in {train} and {test} differ; {'; '.join(words)}.")
    return {"train": files, "test": test_files}, {"train": labels, "test": test_labels}, tuple(classes)


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder directly below has images."""
    return any(path.name.lower().endswith(IMAGE_SUFFIXES) for path in folder.glob("[!.]*/*"))


def own_size(files: Sequence[Path]) -> int | None:
    """Height and width of all images by their headers, where data.image_size does not give one; None for 32x32.

    Where the first image is of 32x32 pixels, decoding compares the others: of such files there are many.

    Raises:
        SpecError: names an image that is not square, or of another size than the first one.
    """
    from PIL import Image

    def size_of(path: Path) -> tuple[int, int]:
        try:
            with os.fdopen(open_regular(path), "rb") as file, Image.open(file, "r", IMAGE_FORMATS) as image:
                return image.size
        except Exception as error:  # PIL has many
            raise SpecError(f"data.root: {path}: {_unreadable(error)}") from None

    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(READERS) as pool:
        side, height = first = size_of(files[0])
        rest = () if first == (IMAGE_SIZE, IMAGE_SIZE) else files[1:]
        for path, size in zip(files, (first, *pool.map(size_of, rest)), strict=False):
            if size != first or side != height or not LEAST_SIZE <= side <= LARGEST_SIZE:
                others = f" and {files[0]} is {side}x{height}" if size != first else ""
                raise SpecError(
                    f"data.root: {path} is {size[0]}x{size[1]} pixels{others}; allowed without data.image_size: "
                    f"squares of one size from {LEAST_SIZE} to {LARGEST_SIZE} pixels.{_RESIZE}"
                )
    return None if side == IMAGE_SIZE else side


def read_image(path: Path, size: int | None = None) -> bytes:
    """The content of an image file.

    Args:
        size: as `pixels`.

    Raises:
        SpecError: it cannot be read, or is far larger than images need.
    """
    largest = LARGEST_IMAGE if size is None else LARGEST_PHOTO
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            # Not simply the most that is allowed: Python would ask the system for so much memory for each file.
            content = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(content) > largest:
        allowed = f"32x32 pixels.{_RESIZE}" if size is None else "a smaller file."
        raise SpecError(f"{path}: holds more than {largest:,} bytes; allowed: {allowed}")
    return content


def decode(files: Sequence[Path], size: int | None = None) -> Tensor:
    """The images in `files`, uint8 [N, 3, height, width]; grey ones and those with a palette become RGB.

    Args:
        size: as `pixels`.

    Raises:
        SpecError: as `read_image` and `pixels`.
    """
    import numpy as np
    import torch

    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(np.stack([pixels(path, read_image(path, size), size) for path in files]))


def pixels(path: Path, content: bytes, size: int | None) -> NDArray[Any]:
    """Decode an image: uint8 [3, height, width].

    Args:
        path: for messages.
        size: height and width to which it is resized: turned as its EXIF says, cut to the square in its middle,
            antialiased (bicubic). None is for images of 32x32 pixels, which stay as they are.

    Raises:
        SpecError: names the file that is no image, too large, or of another size.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), "r", IMAGE_FORMATS) as image:
            width, height = image.size
            if size is not None:
                image.draft(None, (2 * size, 2 * size))  # a JPEG of 4000x3000 is decoded as one of 500x375
                if image.width * image.height <= LARGEST_PIXELS:
                    return np.array(_resized(image, size)).transpose(2, 0, 1)
            elif (width, height) == (IMAGE_SIZE, IMAGE_SIZE):  # else nothing of it is decoded
                return np.array(_rgb(image)).transpose(2, 0, 1)
    except Exception as error:  # PIL has many
        raise SpecError(f"{path}: {_unreadable(error)}") from None
    allowed = f"32x32.{_RESIZE}" if size is None else f"{LARGEST_PIXELS:,} pixels. HINT: make it smaller first."
    raise SpecError(f"{path}: is {width}x{height} pixels; allowed: {allowed}")


def _unreadable(error: Exception) -> str:
    return f"is not a readable image: {one_line(str(error)).partition(' <_io')[0]}."  # of what it was read from


def _resized(image: Picture, size: int) -> Picture:
    from PIL import Image, ImageOps

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = left, top, left + side, top + side
    small = _rgb(image).resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    small.info = image.info
    with suppress(Exception):  # damaged EXIF data, which many photographs have
        return ImageOps.exif_transpose(small)
    return small


def _rgb(image: Picture) -> Picture:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats; allowed: whole numbers of up to 16 bits")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    # Grey of 16 bits, of which `convert` would make all above 255 white. PIL cuts off the lower half of colours of 16
    # bits in a PNG, and rounds in a PPM.
    grey = np.asarray(image).astype(np.int32)
    grey = grey >> 8 if image.format == "PNG" else (grey + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
