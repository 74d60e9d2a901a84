"""Reads pickles of arrays and plain values, such as CIFAR-10's batches, without executing them.

A pickle is a program. pickletools takes it apart into its operations; those that plain data needs are done here, and
the few names that stand for numpy's arrays are known here and never looked up. A pickle that names anything else, or
does anything else, is refused by that name.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown

_NOT_RUN = "nothing in it was executed"
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8"),  # Python 2's text comes as Latin-1
)
_MARK = object()


class _RefusedError(Exception):
    """The pickle is not plain data; the message says why."""


@dataclass(frozen=True)
class _Name:
    """What a pickle calls a function or a class."""

    text: str


@dataclass
class _Dtype:
    """A numpy.dtype that may still be told its byte order."""

    value: np.dtype[Any]


@dataclass
class _Array:
    """A numpy.ndarray that may still be told its content."""

    value: NDArray[Any] | None = None


def read_pickle(path: Path, content: bytes) -> dict[str, Any]:
    """The dictionary that a pickle holds. Keys of bytes become text; arrays among the values become numpy's.

    Args:
        path: for error messages.
        content: of the whole file, protocol 2 or later.

    Raises:
        SpecError: it is damaged, no dictionary, or asks for more than numbers, text, lists and arrays of numbers.
    """
    try:
        result = _Machine().run(content)
        if not isinstance(result, dict):
            raise _RefusedError("it holds no dictionary")
        return {_text(key): _finished(value) for key, value in result.items()}
    except _RefusedError as error:
        raise SpecError(
            f"{path}: a pickle that is not read, since {error}; {_NOT_RUN}. Allowed: a dictionary of arrays, lists, "
            "numbers and text. HINT: save the images with numpy.save instead."
        ) from None
    except Exception as error:  # pickletools and numpy have many for damaged files
        raise SpecError(
            f"{path}: a damaged pickle ({type(error).__name__}: {shown(str(error))}); {_NOT_RUN}."
        ) from None


def _text(key: str | bytes | int) -> str:  # of other objects the text may be without end
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def _finished(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise _RefusedError("an array in it has no content")
        return value.value
    return value


class _Machine:
    """Does a pickle's operations, as far as plain data needs them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(content):
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            else:
                words = f" of {argument}" if isinstance(argument, str) else ""
                raise _RefusedError(f"it uses the operation {name}{words}")
        raise _RefusedError("it has no end")

    def nothing(self, _: Any) -> None:
        pass

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def marked(self) -> list[Any]:
        """Everything above the last mark."""
        above: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            above.append(value)
        return above[::-1]

    def empty_list(self, _: Any) -> None:
        self.stack.append([])

    def list_(self, _: Any) -> None:
        self.stack.append(self.marked())

    def append(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _: Any) -> None:
        self.extend(self.marked())

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _RefusedError("it appends to what is no list")
        self.stack[-1] += values

    def empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def dict_(self, _: Any) -> None:
        values = self.marked()
        self.stack.append({})
        self.set(values)

    def set_item(self, _: Any) -> None:
        value = self.stack.pop()
        self.set([self.stack.pop(), value])

    def set_items(self, _: Any) -> None:
        self.set(self.marked())

    def set(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Not tuples: those that hold themselves many times over take for ever to hash.
            if not isinstance(self.stack[-1], dict) or not isinstance(key, (str, bytes, int)):
                raise _RefusedError("a dictionary in it has other keys than text and numbers")
            self.stack[-1][key] = value

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def tuple_of(self, count: int) -> None:
        values = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def global_(self, names: str) -> None:
        self.name(names.replace(" ", "."))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _RefusedError("it names something otherwise than by text")
        self.name(f"{module}.{name}")

    def name(self, text: str) -> None:
        # numpy 2 renamed the module; both spellings are about.
        known = text.replace("numpy._core.", "numpy.core.")
        if known not in _KNOWN:
            raise _RefusedError(f"it names {text}, which could be any code")
        self.stack.append(_Name(known))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _RefusedError("it calls what is no function")
        self.stack.append(_KNOWN[function.text](*arguments))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            _, order, *fields = state
            if order not in ("<", ">", "|", "=") or any(field is not None for field in fields[:3]):
                raise _RefusedError("an array in it holds other things than numbers")
            target.value = target.value.newbyteorder(order)
        elif isinstance(target, _Array):
            _, shape, kind, by_columns, content = state
            target.value = _array(content, kind, shape, "F" if by_columns else "C")
        else:
            raise _RefusedError("it sets the state of what is no array")


def _array(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    data = content.encode("latin-1") if isinstance(content, str) else content
    numbers = isinstance(kind, _Dtype) and isinstance(data, (bytes, bytearray)) and isinstance(shape, tuple)
    if not numbers or order not in ("C", "F") or any(type(n) is not int or n < 0 for n in shape):
        raise _RefusedError("an array in it holds other things than numbers")
    return np.frombuffer(data, kind.value).reshape(shape, order=order)


def _frombuffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    return _Array(_array(content, kind, shape, order))


def _dtype(name: Any, *_: Any) -> _Dtype:
    if not isinstance(name, (str, bytes)):
        raise _RefusedError("an array in it is of a type without a name")
    text = _text(name)
    if re.fullmatch(r"[<>|=]?[uif][1248]|[|]?b1", text) is None:
        raise _RefusedError(f"an array in it is of type {shown(text)}")
    return _Dtype(np.dtype(text))


def _scalar(kind: Any, content: Any) -> int | float | bool:
    value: int | float | bool = _array(content, kind, (1,), "C")[0].item()
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or not isinstance(encoding, str):
        raise _RefusedError("it encodes what is no text")
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"it encodes text as {shown(encoding)}")
    return text.encode("latin-1")


def _no_function(*_: Any) -> Any:
    raise _RefusedError("it calls what is no function")


# What stands for these names; no attribute of any module is looked up.
_KNOWN: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _no_function,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.nothing),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MARK": _Machine.mark,
    "EMPTY_LIST": _Machine.empty_list,
    "LIST": _Machine.list_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": _Machine.empty_dict,
    "DICT": _Machine.dict_,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "TUPLE": _Machine.tuple_,
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of(0),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
