"""Files of tensors and plain values: written by torch.save, checked as a whole before anything in them is interpreted.

torch.save writes a ZIP archive without compression, with a CRC-32 of every record; torch.load does not check it. Here
it is checked first (1 s for 3 GB), so a flipped bit is found before a damaged pickle can ask for a terabyte of memory.
No code in a file is ever run: weights_only admits tensors and plain values, and nothing else is loaded.
"""

import errno
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cifar_hpc.files import NotRegularError, open_regular

_NOT_RUN = "nothing in it was executed"
# What reading a damaged file, or a damaged disk, leads to; any other OSError says nothing about the file.
_DAMAGE = (errno.EINVAL, errno.EIO, errno.EILSEQ)


class BadFileError(Exception):
    """The file is damaged or foreign; the message says how."""


class _Counting:
    """A file to write to that sums up what goes through it."""

    def __init__(self, file: BinaryIO, advanced: Callable[[int], None]) -> None:
        self.file, self.advanced = file, advanced
        self.sha = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        count = self.file.write(data)
        self.advanced(count)
        return count

    def flush(self) -> None:
        self.file.flush()


def save(tree: Any, file: BinaryIO, advanced: Callable[[int], None] = lambda count: None) -> str:
    """Write `tree`; returns the file's sha256.

    Args:
        advanced: called with the number of bytes written since the last call.
    """
    counting = _Counting(file, advanced)
    torch.save(tree, counting)  # type: ignore[arg-type]
    return counting.sha.hexdigest()


def load(path: Path) -> Any:
    """Read a file that `save` has written; it never hangs (on a FIFO) and never runs what the file holds.

    Raises:
        BadFileError: the file is damaged, or foreign, or not there.
        OSError, MemoryError: it cannot be read just now, which says nothing about the file.
    """
    try:
        descriptor = open_regular(path)
    except NotRegularError as error:
        raise BadFileError(str(error.strerror)) from None
    except FileNotFoundError:
        raise BadFileError("a link to nothing" if path.is_symlink() else "there is no such file") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, *_DAMAGE):
            raise BadFileError(f"cannot be opened: {error.strerror}") from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        _check_whole(file)
        file.seek(0)
        return _interpret(file)


def _check_whole(file: BinaryIO) -> None:
    try:
        head = file.read(4)
        if not head:
            raise BadFileError("empty")
        if head[:1] == b"\x80":
            raise BadFileError(f"a bare pickle, no checkpoint or cache of cifar_hpc; {_NOT_RUN}")
        if head != b"PK\3\4":
            raise BadFileError(f"no file of torch.save, or damaged: it begins with {head!r}")
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise BadFileError("compressed, which no checkpoint or cache of cifar_hpc is")
            if (bad := archive.testzip()) is not None:
                raise BadFileError(f"damaged: the sum of its record {bad} is wrong")
    except BadFileError:
        raise
    except Exception as error:  # zipfile fails in many ways on a damaged file
        if isinstance(error, OSError) and error.errno not in _DAMAGE:
            raise
        raise BadFileError(f"damaged or cut short ({type(error).__name__}: {error})") from None


def _interpret(file: BinaryIO) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        if names := _unsafe_globals(file):
            raise BadFileError(f"holds code (pickle globals: {', '.join(names)}), which was not executed") from None
        words = _first_line(str(error).rpartition("WeightsUnpickler error:")[2])
        raise BadFileError(f"holds more than tensors and plain values ({words}); {_NOT_RUN}") from None
    except Exception as error:  # foreign, or damaged where zipfile does not look
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise MemoryError(_first_line(str(error))) from None
        raise BadFileError(f"damaged or foreign ({type(error).__name__}: {_first_line(str(error))})") from None


def _unsafe_globals(file: BinaryIO) -> list[str]:
    """Names that a pickle would call, found by reading it without running it."""
    file.seek(0)
    try:
        return [_first_line(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)][:5]
    except Exception:  # a pickle that is odd in another way as well
        return []


def _first_line(text: str) -> str:
    return next(iter(re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()), "")[:120]


def digest(value: Any) -> str:
    """sha256 of a tree of dicts, lists, plain values and tensors: of what it means, not of how it lies in memory."""
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()


def _update(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        sha.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=str):
            sha.update(f"{key!r}:".encode())
            _update(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"list {len(value)};".encode())
        for item in value:
            _update(sha, item)
    else:
        sha.update(f"{value!r};".encode())


def seal(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the digest that `check_seal` verifies."""
    tree.pop("digest", None)
    tree["digest"] = digest(tree)
    return tree


def check_seal(tree: dict[str, Any]) -> None:
    """Verify the digest.

    Raises:
        BadFileError: the content is not what was sealed.
    """
    try:
        right = tree["digest"] == digest({key: value for key, value in tree.items() if key != "digest"})
    except Exception as error:  # kinds of tensors that have no plain bytes, nesting without end, ...
        raise BadFileError(f"holds what was never saved ({type(error).__name__})") from None
    if not right:
        raise BadFileError("its content does not match its digest: damaged")
