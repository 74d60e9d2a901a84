"""Spec fields: declaring one with its bounds, and turning a plain value into its type or a clear error."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from cifar_hpc.errors import SpecError, nearest

T = TypeVar("T")


def option(
    default: Any, help: str, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> Any:
    """A spec field: its default, one line of documentation (with the unit), and the allowed range."""
    metadata = {"help": help, "low": low, "above": above, "high": high}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Build the frozen dataclass `cls` (sections nest) from a mapping.

    Raises:
        SpecError: for an unknown key, a wrong type or a value out of range; it names the dotted key.
    """
    if values is None:
        values = {}
    where = path or "the spec"
    if not isinstance(values, dict):
        raise SpecError(f"{where}: {values!r} is not allowed; allowed: a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    arguments = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise SpecError(
                f"{dotted}: unknown key; allowed in {where}: {', '.join(fields)}." + nearest(str(key), fields)
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = build(typing.cast(Any, hint), value, dotted)
        else:
            arguments[key] = _convert(value, hint, fields[key].metadata, dotted)
    return cls(**arguments)


def _convert(value: Any, hint: Any, metadata: Any, dotted: str) -> Any:
    try:
        converted = _to_type(value, hint)
    except (TypeError, ValueError, OverflowError):
        text = str(value)
        choices = [c for c in typing.get_args(hint) if isinstance(c, str)]
        raise SpecError(
            f"{dotted}: {value!r} is not allowed; allowed: {_describe(hint, metadata)}." + nearest(text, choices)
        ) from None
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, (int, float)) and not isinstance(number, bool) and not _in_range(number, metadata):
            raise SpecError(f"{dotted}: {value!r} is not allowed; allowed: {_describe(hint, metadata)}.")
    return converted


def _to_type(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _to_type(value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise TypeError
        if arguments[-1] is Ellipsis:
            return tuple(_to_type(v, arguments[0]) for v in value)
        if len(value) != len(arguments):
            raise ValueError
        return tuple(_to_type(v, a) for v, a in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {str(k): str(v) for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)  # YAML reads partition: 1080 as a number
    if hint in (int, bool) and type(value) is hint:
        return value
    raise TypeError


def _in_range(number: float, metadata: Any) -> bool:
    low, above, high = (metadata.get(k) for k in ("low", "above", "high"))
    # Written so that NaN, which compares false with everything, is out of every range.
    return (
        (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
        and number == number
        and abs(number) != float("inf")
    )


def _describe(hint: Any, metadata: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _describe(next(a for a in arguments if a is not type(None)), metadata) + ", or null"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return "a list, each " + _describe(arguments[0], metadata)
        return f"a list of {len(arguments)}, each " + _describe(arguments[0], metadata)
    if origin is dict:
        return "a mapping of names to values"
    name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]
    low, above, high = (metadata.get(k) for k in ("low", "above", "high"))
    bounds = [f"{symbol} {bound:g}" for symbol, bound in ((">=", low), (">", above), ("<=", high)) if bound is not None]
    return " ".join([name, " and ".join(bounds)]).strip()
