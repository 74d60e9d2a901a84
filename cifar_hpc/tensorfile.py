"""Files of tensors and plain values: written by torch.save, checked as a whole before anything in them is interpreted.

torch.save writes a ZIP archive without compression, with a CRC-32 of every record; torch.load does not check it, and
believes what a pickle says of sizes. Here the sums are checked first, so a flipped bit is found before a damaged pickle
can ask for a terabyte of memory, and every tensor has to fit into a record of its own. Time and memory that a file
takes therefore grow with its size alone. No code in a file is ever run.
"""

import errno
import hashlib
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from cifar_hpc.files import NotRegularError, open_regular

_NOT_RUN = "nothing in it was executed"
# What reading a damaged file, or a damaged disk, leads to; any other OSError says nothing about the file.
_DAMAGE = (errno.EINVAL, errno.EIO, errno.EILSEQ)
# Types of tensors that a file may hold, by the names that torch.save gives them.
TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_PIECE = 2**20  # bytes that are read at once: they stay in the processor's cache


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
    try:
        torch.save(tree, counting)  # type: ignore[arg-type]
    except RuntimeError as error:  # such as "unexpected pos", in place of what the disk says
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
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
        records = _read_records(file)
    try:
        return _Reader(records).load()
    except BadFileError:
        raise
    except Exception as error:  # what was never written by torch.save
        raise BadFileError(
            f"damaged or foreign ({type(error).__name__}: {_first_line(str(error))}); {_NOT_RUN}"
        ) from None


def _read_records(file: BinaryIO) -> dict[str, Tensor]:
    """The bytes of each record by its name in the archive. All sums are right."""
    try:
        head = file.read(4)
        if not head:
            raise BadFileError("empty")
        if head[:1] == b"\x80":
            raise BadFileError(f"a bare pickle, no checkpoint or cache of cifar_hpc; {_NOT_RUN}")
        if head != b"PK\3\4":
            raise BadFileError(f"no file of torch.save, or damaged: it begins with {head!r}")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
                raise BadFileError("compressed, which no checkpoint or cache of cifar_hpc is")
            if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
                raise BadFileError("damaged or foreign: its records overlap, or are longer than the file")
            return {entry.filename.partition("/")[2]: _read_record(archive, entry) for entry in entries}
    except BadFileError:
        raise
    except Exception as error:  # zipfile fails in many ways on a damaged file
        if isinstance(error, (OSError, MemoryError)) and getattr(error, "errno", None) not in _DAMAGE:
            raise
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise MemoryError(_first_line(str(error))) from None
        raise BadFileError(f"damaged or cut short ({type(error).__name__}: {_first_line(str(error))})") from None


def _read_record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    content = torch.empty(entry.file_size, dtype=torch.uint8)
    view, place = content.numpy().data, 0
    try:
        with archive.open(entry) as record:
            while piece := record.read(_PIECE):
                view[place : place + len(piece)] = piece
                place += len(piece)
    except zipfile.BadZipFile:
        raise BadFileError(f"damaged: the sum of its record {entry.filename[:120]} is wrong") from None
    return content


_OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_LIST, pickle.APPEND,
    pickle.APPENDS, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET,
    pickle.LONG_BINGET,
)  # fmt: skip


class _Reader(pickle._Unpickler):
    """Reads what torch.save pickles of tensors, dicts, lists and plain values, and calls nothing that the file names.

    Values are a tree: only text and names of types may be repeated, since a list of two times a list of two times
    ... has 2^60 ways through it in a kilobyte. Each record belongs to one tensor.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[Any] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def __init__(self, records: dict[str, Tensor]) -> None:
        super().__init__(io.BytesIO(records["data.pkl"].numpy().data))
        self.records, self.memo = records, _Memo(10 * sum(map(len, records.values())))

    def find_class(self, module: str, name: str) -> Any:
        names = {f"torch.{key}Storage": dtype for key, dtype in TYPES.items()}
        known = {"torch._utils._rebuild_tensor_v2": self._tensor, "collections.OrderedDict": lambda: None, **names}
        name = f"{module}.{name}"[:120]
        if name in known:  # the OrderedDict is of hooks, empty in every tensor
            return known[name]
        if name.startswith("torch."):
            raise BadFileError(f"holds what no checkpoint or cache of cifar_hpc does ({name})")
        raise BadFileError(f"holds code (pickle globals: {name}), which was not executed")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        flat = self.records.pop(f"data/{key}").view(dtype)
        if len(flat) != count:
            raise ValueError("a record of another size")
        return flat

    def _tensor(self, flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
        if not whole or len(size) > 8 or math.prod(size) > len(flat):
            raise ValueError("a tensor that is larger than its record")
        return flat.as_strided(size, stride, offset)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or any(type(key) not in (str, int) for key in items[::2]):
            raise ValueError("keys that are neither text nor numbers")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = lambda self: self._set_items(self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()])


class _Memo(dict[int, Any]):
    """The values that a pickle repeats: names of types, and so many characters of text."""

    def __init__(self, characters: int) -> None:
        self.left = characters

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        if isinstance(value, (list, dict, tuple, Tensor)):
            raise ValueError("one list, mapping or tensor in several places")
        self.left -= len(value) if isinstance(value, str) else 0
        if self.left < 0:
            raise ValueError("text that is repeated beyond measure")
        return value


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:120]


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
