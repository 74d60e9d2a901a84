"""Images to predict, from a folder, an array file, or a pickle such as CIFAR-10's batches."""

import io
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_hpc.data.image_folder import IMAGE_SUFFIXES, decode, list_split
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import SpecError
from cifar_hpc.files import NotRegularError, open_regular
from cifar_hpc.text import counted, shown

LARGEST_BYTES = 2**33  # of a file that is read as a whole
_CONTENT = "a .npy or .npz file, a CIFAR pickle (protocol 2 or later), an image, or a folder of images or class folders"


@dataclass(frozen=True)
class ImageInput:
    """Images that are read a part at a time.

    Attributes:
        ids: one of each image, in order: its own where the input has them, its file's stem in a folder, else its index.
        read: gives the images from one index up to another as uint8 [n, 3, S, S].
        left_out: entries of the folder that are no images by their names.
        labels: the true class of each image, int64 [N], where the input has them; of class folders in the order of
            `classes`, their names.
        files: of each image, where they are files.
    """

    ids: list[str]
    read: Callable[[int, int], Tensor]
    left_out: int = 0
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    files: Sequence[Path] = ()


def open_images(path: Path, info: DatasetInfo, resize: bool = False) -> ImageInput:
    """Open a folder of images or a file, whose kind is found by its first bytes and not by its name.

    Args:
        info: of the run, whose size the images have.
        resize: image files of other sizes are resized, as `pixels` does it.

    Raises:
        SpecError: names the file, what is wrong with it, and what is allowed; `ImageInput.read` does the same.
    """
    size = info.image_size if resize else None
    if path.is_dir():
        return _open_folder(path, info, size)
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        return _of_files([path], 0, size)
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file or folder; allowed: {_CONTENT}.") from None
    except NotRegularError as error:
        raise SpecError(f"{path}: {error.strerror}; allowed: {_CONTENT}.") from None
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(6)
        file.seek(0)
        try:
            if start == b"\x93NUMPY":  # read from disk a part at a time
                return _from_array(path, info, np.load(path, mmap_mode="r", allow_pickle=False), None)
            if start[:4] == b"PK\3\4":
                return _open_npz(path, info, file)
            if start[:1] == b"\x80":
                _check_size(path, os.fstat(file.fileno()).st_size)
                return _open_pickle(path, info, file.read())
        except SpecError:
            raise
        except Exception as error:  # numpy, zipfile and zlib have many for a damaged file
            kind = "arrays" if start[:4] == b"PK\3\4" else "an array"
            raise SpecError(f"{path}: cannot be read as {kind}: {error}.") from None
    what = f"it begins with {start!r}" if start else "it is empty"
    raise SpecError(f"{path}: is none of the files that can be read ({what}); allowed: {_CONTENT}.")


def _open_folder(folder: Path, info: DatasetInfo, size: int | None) -> ImageInput:
    entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    files = [Path(entry.path) for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if files:
        return _of_files(files, len(entries) - len(files), size)
    below = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if below and (len(below) == len(info.classes) or set(below) <= set(info.classes)):
        files, labels, classes = list_split(folder, "INPUT")
        found = _of_files(files, 0, size, [f"{path.parent.name}/{path.stem}" for path in files])
        return replace(found, labels=torch.tensor(labels), classes=tuple(classes))
    hint = f" HINT: it has folders, such as {below[0]}; give one of them." if below else ""
    raise SpecError(f"{folder}: holds no image ({' '.join(IMAGE_SUFFIXES)}).{hint}")


def _of_files(files: Sequence[Path], left_out: int, size: int | None, ids: Sequence[str] = ()) -> ImageInput:
    seen: dict[str, Path] = {}
    for path, name in zip(files, ids or [path.stem for path in files], strict=True):
        if not path.is_file():  # a FIFO would be waited for, a device read for ever
            raise SpecError(f"{path}: is no regular file; allowed: image files, or links to them.")
        if name in seen:
            raise SpecError(f"{path}: has the same ID as {seen[name].name}. HINT: rename one of them.")
        seen[name] = path
    return ImageInput(list(seen), lambda first, last: decode(files[first:last], size), left_out, files=files)


def _natural(name: str) -> list[Any]:
    """A key that puts 2.png before 10.png; the odd ones of the parts are the numbers."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def _open_npz(path: Path, info: DatasetInfo, file: BinaryIO) -> ImageInput:
    with np.load(file, allow_pickle=False) as arrays:
        _check_size(path, sum(record.file_size for record in arrays.zip.infolist()))
        names = [name for name in arrays.files if f"{name}.npy" in arrays.zip.namelist()]
        if not names:
            raise SpecError(f"{path}: a ZIP archive without arrays; allowed: what numpy.savez writes.")
        images = [n for n in names if n in ("data", "images")] or [n for n in names if n not in ("ids", "labels")]
        if len(images) != 1:
            raise SpecError(
                f"{path}: which of its arrays holds the images? {', '.join(names)}. Allowed: one array, or one "
                "called data or images; a second one called ids is allowed."
            )
        found = _from_array(path, info, arrays[images[0]], arrays["ids"] if "ids" in names else None)
        return _labelled(found, info, arrays["labels"] if "labels" in names else None)


def _open_pickle(path: Path, info: DatasetInfo, content: bytes) -> ImageInput:
    values = read_pickle(path, content)
    data = values.get("data")
    if not isinstance(data, np.ndarray):
        held = ", ".join(values)[:200] or "nothing"
        raise SpecError(
            f"{path}: a pickle without an array called data; it holds: {held}. Allowed: CIFAR's layout, a dictionary "
            "with data and, if you like, ids."
        )
    labels = values.get("labels", values.get("fine_labels"))  # of CIFAR-100
    return _labelled(_from_array(path, info, data, values.get("ids")), info, labels)


def _labelled(images: ImageInput, info: DatasetInfo, labels: Any) -> ImageInput:
    """The images with their labels, if these are one class for each image."""
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(values, (list, tuple)) or len(values) != len(images.ids):
        return images
    good = all(type(value) is int and 0 <= value < len(info.classes) for value in values)
    return replace(images, labels=torch.tensor(values)) if good else images


def _from_array(path: Path, info: DatasetInfo, array: NDArray[Any], ids: Any) -> ImageInput:
    if array.dtype != np.uint8:
        hint = "(255 * images).round().astype('uint8')" if array.dtype.kind == "f" else "images.astype('uint8')"
        raise SpecError(
            f"{path}: the images are {array.dtype}; allowed: uint8, from 0 to 255. HINT: where the values are "
            f"{'0 to 1' if array.dtype.kind == 'f' else '0 to 255'}, save {hint} instead."
        )
    side, count = info.image_size, len(array) if array.ndim else 0
    if array.shape[1:] in ((3, side, side), (3 * side * side,)):
        rows: NDArray[Any] = array.reshape(count, 3, side, side)
    elif array.shape[1:] == (side, side, 3):
        rows = array.transpose(0, 3, 1, 2)
    else:
        single = array.shape in ((side, side, 3), (3, side, side))
        hint = " HINT: for a single image, save image[None]." if single else ""
        shapes = f"[N, {side}, {side}, 3], [N, 3, {side}, {side}] or CIFAR's rows [N, {3 * side * side}]"
        raise SpecError(f"{path}: the images are of shape {list(array.shape)}; allowed: {shapes}.{hint}")
    if count == 0:
        raise SpecError(f"{path}: holds no image.")
    return ImageInput(_ids(path, ids, count), lambda first, last: torch.from_numpy(np.array(rows[first:last])))


def _ids(path: Path, ids: Any, count: int) -> list[str]:
    if ids is None:
        return [str(index) for index in range(count)]
    values = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not isinstance(values, (list, tuple)) or len(values) != count:
        number = counted(len(values), "id") if isinstance(values, (list, tuple)) else "ids that are no list"
        raise SpecError(f"{path}: has {counted(count, 'image')}, but {number}.")
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


def read_pickle(path: Path, content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of protocol 2 or later, without executing code.

    Keys of bytes become text; arrays among the values become numpy's.

    Args:
        path: for error messages.

    Raises:
        SpecError: it is damaged, no dictionary, or asks for more than numbers, text, lists and arrays of numbers.
    """
    try:
        values = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(values, dict):
            raise UnpicklingError("it holds no dictionary")
        return {_text(key): value.value if isinstance(value, _Array) else value for key, value in values.items()}
    except Exception as error:  # pickle and numpy have many for damaged files
        reason = str(error) if isinstance(error, UnpicklingError) else f"{type(error).__name__}: {shown(str(error))}"
        raise SpecError(
            f"{path}: a pickle that cannot be read: {reason}; nothing in it was executed. Allowed: a dictionary of "
            "arrays, lists, numbers and text. HINT: save the images with numpy.save instead."
        ) from None


class _Dictionary(dict[Any, Any]):
    """A dictionary that refuses keys whose hash may be expensive."""

    def __setitem__(self, key: Any, value: Any) -> None:
        # Hashing a tuple never ends if it repeats itself at each of many levels, and overflows the stack if it is deep.
        if not isinstance(key, (str, bytes, int)):
            raise UnpicklingError("a dictionary in it has other keys than text and numbers")
        super().__setitem__(key, value)


class _Dtype:
    """Takes the calls of a pickled numpy.dtype: the name of a type, then its byte order."""

    def __init__(self, name: Any, *_: Any) -> None:
        text = _text(name) if isinstance(name, (str, bytes)) else "without a name"
        if re.fullmatch(r"[<>|=]?[uif][1248]|[|]?b1", text) is None:
            raise UnpicklingError(f"an array in it is of type {shown(text)}")
        self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        _, order, *fields = state
        if order not in ("<", ">", "|", "=") or any(field is not None for field in fields[:3]):
            raise UnpicklingError("an array in it holds other things than numbers")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Takes the calls of a pickled numpy.ndarray: an empty one, then its content."""

    def __init__(self, value: NDArray[Any] | None = None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        self.value = _array(content, kind, shape, "F" if by_columns else "C")


def _array(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    """A view of `content`, which takes no memory of its own, whatever the shape."""
    data = content.encode("latin-1") if isinstance(content, str) else content
    numbers = isinstance(kind, _Dtype) and isinstance(data, bytes) and isinstance(shape, tuple)
    if not numbers or order not in ("C", "F") or any(type(n) is not int or n < 0 for n in shape):
        raise UnpicklingError("an array in it holds other things than numbers")
    return np.frombuffer(data, kind.value).reshape(shape, order=order)


def _scalar(kind: Any, content: Any) -> Any:
    return _array(content, kind, (1,), "C")[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes as Python 3 writes them in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnpicklingError("it encodes text other than as latin1")
    return text.encode("latin-1")


def _text(key: str | bytes | int) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


class _PlainUnpickler(pickle._Unpickler):
    """Builds numbers, text, lists, dictionaries and arrays of numbers, and calls only functions of this module.

    Derived from the Unpickler written in Python: the one in C allocates up to 64 GiB for a memo index of five bytes.
    """

    stack: list[Any]
    constructors: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": None,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": lambda *_: _Array(),  # type and shape come again with the content
        "numpy.core.multiarray.scalar": _scalar,
        "numpy.core.numeric._frombuffer": lambda *arguments: _Array(_array(*arguments)),
        "_codecs.encode": _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # as numpy 2 calls it
        if known not in self.constructors:
            raise UnpicklingError(f"it names {module[:100]}.{name[:100]}, which could be any code")
        return self.constructors[known]

    def _dictionary(self) -> None:
        self.stack.append(_Dictionary())

    def _unhashed(self) -> None:
        raise UnpicklingError("it holds a set, or a dictionary of protocol 0")

    def _state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (_Dtype, _Array)):  # attributes of functions could be set, too
            raise UnpicklingError("it sets the state of something other than an array")
        target.__setstate__(state)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: _dictionary,
        pickle.BUILD[0]: _state,
        # Bytes are read before memory is allocated; a bytearray is allocated in the size that the file claims.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
        **dict.fromkeys((pickle.DICT[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), _unhashed),
    }
