"""Spec fields: declaring one with its bounds, and turning a plain value into its type or a clear error."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from cifar_hpc.config.yaml_loader import WrittenFloat, WrittenInt
from cifar_hpc.errors import SpecError, UnknownKeyError, nearest
from cifar_hpc.text import control_character, shown

T = TypeVar("T")
MAX_TEXT = 4096  # characters, as many as the longest path
_IN_QUOTES = """ HINT: put it in quotes, in a shell in two kinds: --set '{}="..."'."""


def option(
    default: Any, help: str, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> Any:
    """A spec field: its default, one line of documentation (with the unit), and the allowed range."""
    metadata = {"help": help, "low": low, "above": above, "high": high}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest_key(key: str, root: type, section: Iterable[str] = ()) -> str:
    """A hint at the key, in any section of `root`, whose name is spelt most like the last part of `key`.

    Args:
        section: keys of the section that `key` is in, which come first.
    """
    known: dict[str, str] = {}
    for outer, hint in typing.get_type_hints(root).items():
        for name in typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else ():
            known[name] = f"{known[name]}' or '{outer}.{name}" if name in known else f"{outer}.{name}"
    known |= {name: name for name in section}
    return nearest(key.rpartition(".")[2], known, known)


def build(cls: type[T], values: Any, path: str = "", root: type | None = None) -> T:
    """Build the frozen dataclass `cls` (sections nest) from a mapping.

    Args:
        path, root: of a section, its dotted key and the dataclass that it is in.

    Raises:
        SpecError: for an unknown key, a wrong type or a value out of range; it names the dotted key.
    """
    if values is None:
        values = {}
    where = path or "the spec"
    if not isinstance(values, dict):
        raise SpecError(f"{where}: {shown(values)} is not allowed; allowed: a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in fields:
            hint = nearest_key(str(key), root or cls, fields)
            raise UnknownKeyError(f"{dotted}: unknown key; allowed in {where}: {', '.join(fields)}.{hint}")
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = build(hints[key], value, dotted, root or cls)
        else:
            arguments[key] = _convert(value, hints[key], fields[key].metadata, dotted)
    return cls(**arguments)


def _convert(value: Any, hint: Any, metadata: Any, dotted: str) -> Any:
    if hint == dict[str, Any] and isinstance(value, dict):
        return {_name(k, dotted): _plain(item, f"{dotted}.{k}") for k, item in value.items()}
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        # true and false are options without a value, given or left out.
        items = {_name(k, dotted): str(v).lower() if isinstance(v, bool) else v for k, v in value.items()}
        return {name: _convert(item, str, {}, f"{dotted}.{name}") for name, item in items.items()}
    try:
        converted = _to_type(value, hint)
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error) if isinstance(error, _TextError) else ""
        kinds = (hint, *typing.get_args(hint))
        choices = [kind for kind in kinds if isinstance(kind, str)]
        raise SpecError(
            f"{dotted}: {shown(value)} is not allowed; allowed: {describe(hint, metadata)}{reason}."
            + nearest(str(value)[:MAX_TEXT], choices)
            + (_IN_QUOTES.format(dotted) if isinstance(value, bool) and str in kinds else "")
        ) from None
    if not _in_range(converted, metadata):
        raise SpecError(f"{dotted}: {shown(value)} is not allowed; allowed: {describe(hint, metadata)}.")
    return converted


def _plain(value: Any, dotted: str) -> Any:
    """A value of a user's own keys: what YAML and JSON can hold, nested at will."""
    if isinstance(value, dict):
        return {_name(k, dotted): _plain(item, f"{dotted}.{k}") for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, dotted) for item in value]
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return None if value is None else _convert(value, kind or str, {}, dotted)


def _name(key: Any, dotted: str) -> str:
    if isinstance(key, str) and control_character(key) is None:
        return key
    raise SpecError(f"{dotted}: the key {shown(key)} is not allowed; allowed: text. HINT: put it in quotes.")


class _TextError(ValueError):
    """Text that no field can hold."""


def _text(text: str) -> str:
    character = control_character(text)
    if character is not None:
        raise _TextError(f" on one line, without {character!a} or other control characters")
    if len(text) > MAX_TEXT:
        raise _TextError(f" of at most {MAX_TEXT} characters")
    return text


def _to_type(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind, *others = [a for a in arguments if a is not type(None)]
        if others and isinstance(value, str):  # int | str; a flag's number is text, too
            return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else _text(value)
        return _to_type(value, kind)
    if origin is Literal:
        if isinstance(value, bool) and "on" in arguments:  # as which YAML reads on and off
            return "on" if value else "off"
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (not value and arguments[0] is not str):
            raise TypeError
        if arguments[-1] is Ellipsis:
            return tuple(_to_type(v, arguments[0]) for v in value)
        if len(value) != len(arguments):
            raise ValueError
        return tuple(_to_type(v, a) for v, a in zip(value, arguments, strict=True))
    allowed = {float: (int, float), str: (str, int, float), int: (int,), bool: (bool,)}.get(hint, ())
    if not isinstance(value, allowed) or isinstance(value, bool) != (hint is bool):
        raise TypeError
    if hint is str:  # a number as it is written in the file: 1.10 is not 1.1
        return _text(value.text if isinstance(value, (WrittenInt, WrittenFloat)) else str(value))
    return hint(value) + 0.0 if hint is float else hint(value)  # -0.0 is 0.0, also in the name of a run


def _in_range(value: Any, metadata: Any) -> bool:
    if isinstance(value, tuple):
        return all(_in_range(item, metadata) for item in value)
    if not isinstance(value, (int, float)):
        return True
    return abs(value) < math.inf and all(compare(value, bound) for _, compare, bound in _bounds(metadata))


def _bounds(metadata: Any) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
    kinds = (("low", ">=", operator.ge), ("above", ">", operator.gt), ("high", "<=", operator.le))
    return [(symbol, compare, metadata[key]) for key, symbol, compare in kinds if metadata.get(key) is not None]


def describe(hint: Any, metadata: Any) -> str:
    """In words, what a field of the type `hint` and the bounds in `metadata` may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [describe(a, metadata if a is not str else {}) for a in arguments if a is not type(None)]
        return ", or ".join(kinds + ["null"] * (type(None) in arguments))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return "a list, each " + describe(arguments[0], metadata)
        return f"a list of {len(arguments)}, each " + describe(arguments[0], metadata)
    if origin is dict:
        return "a mapping of names to values"
    name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]
    bounds = [f"{symbol} {b if isinstance(b, int) else format(b, 'g')}" for symbol, _, b in _bounds(metadata)]
    return " ".join([name, " and ".join(bounds)]).strip()
