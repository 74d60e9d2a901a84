"""Images to predict, from whatever they lie in: a folder, an array file, or a pickle such as CIFAR-10's batches."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE
from cifar_hpc.data.image_folder import IMAGE_FORMATS, IMAGE_SUFFIXES
from cifar_hpc.data.unpickle import read_pickle
from cifar_hpc.errors import SpecError
from cifar_hpc.files import NotRegularError, open_regular

LARGEST_BYTES = 2**33  # of what is read as a whole
_SHAPES = "[N, 32, 32, 3], [N, 3, 32, 32] or CIFAR's rows [N, 3072]"
_CONTENT = "a .npy or .npz file, a CIFAR pickle (protocol 2 or later), or a folder of images"


@dataclass(frozen=True)
class ImageInput:
    """Images that are read a part at a time.

    Attributes:
        ids: one of each image, in order: its own where the input has them, its file's stem in a folder, else its index.
        read: gives the images from one index up to another as uint8 [n, 3, 32, 32].
        left_out: entries of the folder that are no images by their names.
    """

    ids: list[str]
    read: Callable[[int, int], Tensor]
    left_out: int = 0


def open_images(path: Path) -> ImageInput:
    """Find out what `path` is, by its content and not by its name.

    Raises:
        SpecError: names the file, what is wrong with it, and what is allowed; `ImageInput.read` does the same.
    """
    if path.is_dir():
        return _open_folder(path)
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file or folder; allowed: {_CONTENT}.") from None
    except NotRegularError as error:
        raise SpecError(f"{path}: {error.strerror}; allowed: {_CONTENT}.") from None
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(6)
        if start == b"\x93NUMPY":
            return _from_array(path, _load_npy(path), None)
        if start[:4] == b"PK\3\4":
            return _open_npz(path)
        if start[:1] == b"\x80":
            _check_size(path, os.fstat(file.fileno()).st_size)
            file.seek(0)
            return _open_pickle(path, file.read())
    what = f"it begins with {start!r}" if start else "it is empty"
    raise SpecError(f"{path}: is none of the files that can be read ({what}); allowed: {_CONTENT}.")


def decode(files: Sequence[Path]) -> Tensor:
    """The images in `files`, uint8 [N, 3, 32, 32]; grey ones and those with a palette become RGB, as in training.

    Raises:
        SpecError: names the file that is no image, or of another size.
    """
    from PIL import Image

    images = torch.empty(len(files), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for number, path in enumerate(files):
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                size = image.size
                if size == (IMAGE_SIZE, IMAGE_SIZE):  # else nothing of it is decoded
                    images[number] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # PIL has many
            raise SpecError(f"{path}: is not a readable image: {error}.") from None
        if size != (IMAGE_SIZE, IMAGE_SIZE):
            raise SpecError(
                f"{path}: is {size[0]}x{size[1]} pixels; allowed: {IMAGE_SIZE}x{IMAGE_SIZE}, what the model was "
                "trained on. HINT: resize the images first."
            )
    return images


def _open_folder(folder: Path) -> ImageInput:
    entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    files = [Path(entry.path) for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        below = [entry.name for entry in entries if entry.is_dir()]
        hint = f" HINT: it has folders, such as {below[0]}; give one of them." if below else ""
        raise SpecError(f"{folder}: holds no image ({' '.join(IMAGE_SUFFIXES)}).{hint}")
    seen: dict[str, Path] = {}
    for path in files:
        if not path.is_file():  # a FIFO would be waited for, a device read for ever
            raise SpecError(f"{path}: is no regular file; allowed: image files, or links to them.")
        if path.stem in seen:
            raise SpecError(f"{path}: has the same ID as {seen[path.stem].name}. HINT: rename one of them.")
        seen[path.stem] = path
    return ImageInput(list(seen), lambda first, last: decode(files[first:last]), len(entries) - len(files))


def _natural(name: str) -> list[Any]:
    """A key that puts 2.png before 10.png; the odd ones of the parts are the numbers."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)  # read from disk a part at a time
        return array
    except Exception as error:  # numpy has many for a damaged file
        raise SpecError(f"{path}: cannot be read as an array: {error}.") from None


def _open_npz(path: Path) -> ImageInput:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(record.file_size for record in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            members = arrays.zip.namelist()
            names = [name for name in arrays.files if f"{name}.npy" in members]
            if not names:
                raise SpecError(f"{path}: a ZIP archive without arrays; allowed: what numpy.savez writes.")
            images = [n for n in names if n in ("data", "images")] or [n for n in names if n not in ("ids", "labels")]
            if len(images) != 1:
                raise SpecError(
                    f"{path}: which of its arrays holds the images? {', '.join(names)}. Allowed: one array, or one "
                    "called data or images; ids may stand beside it."
                )
            return _from_array(path, arrays[images[0]], arrays["ids"] if "ids" in names else None)
    except SpecError:
        raise
    except Exception as error:  # numpy, zipfile and zlib have many for a damaged file
        raise SpecError(f"{path}: cannot be read as arrays: {error}.") from None


def _open_pickle(path: Path, content: bytes) -> ImageInput:
    values = read_pickle(path, content)
    data = values.get("data")
    if not isinstance(data, np.ndarray):
        raise SpecError(
            f"{path}: a pickle without an array called data; it holds: {', '.join(values) or 'nothing'}. Allowed: "
            "CIFAR's layout, a dictionary with data and, if you like, ids."
        )
    return _from_array(path, data, values.get("ids"))


def _from_array(path: Path, array: NDArray[Any], ids: Any) -> ImageInput:
    if array.dtype != np.uint8:
        hint = "(255 * images).round().astype('uint8')" if array.dtype.kind == "f" else "images.astype('uint8')"
        raise SpecError(
            f"{path}: the images are {array.dtype}; allowed: uint8, from 0 to 255. HINT: where the values are "
            f"{'0 to 1' if array.dtype.kind == 'f' else '0 to 255'}, save {hint} instead."
        )
    side, count = IMAGE_SIZE, len(array) if array.ndim else 0
    if array.shape[1:] in ((3, side, side), (3 * side * side,)):
        rows: NDArray[Any] = array.reshape(count, 3, side, side)
    elif array.shape[1:] == (side, side, 3):
        rows = array.transpose(0, 3, 1, 2)
    else:
        hint = (
            " HINT: for a single image, save image[None]." if array.shape in ((side, side, 3), (3, side, side)) else ""
        )
        raise SpecError(f"{path}: the images are of shape {list(array.shape)}; allowed: {_SHAPES}.{hint}")
    if count == 0:
        raise SpecError(f"{path}: holds no image.")
    return ImageInput(_ids(path, ids, count), lambda first, last: torch.from_numpy(np.array(rows[first:last])))


def _ids(path: Path, ids: Any, count: int) -> list[str]:
    if ids is None:
        return [str(index) for index in range(count)]
    values = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not isinstance(values, (list, tuple)) or len(values) != count:
        number = f"{len(values)} ids" if isinstance(values, (list, tuple)) else "ids that are no list"
        raise SpecError(f"{path}: has {count} images, but {number}.")
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    if not all(isinstance(text, str) or (isinstance(text, int) and abs(text) < 2**64) for text in texts):
        raise SpecError(f"{path}: its ids are neither whole numbers nor text.")
    return [str(text) for text in texts]


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST_BYTES:
        raise SpecError(
            f"{path}: holds {size:,} bytes; allowed: up to {LARGEST_BYTES:,}, since it is read as a whole. HINT: a "
            ".npy file of any size is read a part at a time."
        )
