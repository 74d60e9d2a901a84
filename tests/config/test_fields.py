"""Plain values become typed fields, or an error that names key, value, what is allowed, and the nearest spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from cifar_hpc.config.fields import MAX_TEXT, build, option
from cifar_hpc.config.yaml_loader import parse_yaml
from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown


@dataclass(frozen=True)
class Inner:
    count: int = option(3, "a count", low=1)
    rate: float = option(0.5, "a rate", above=0, high=1)
    free: float = option(0.0, "no bounds")
    shape: Literal["round", "square"] = option("round", "a shape")
    sizes: tuple[int, ...] = option((1, 2), "sizes", low=1)
    pair: tuple[float, float] = option((0.0, 1.0), "from and to")
    limit: int | None = option(None, "a limit", low=1)
    flag: bool = option(False, "a flag")
    words: str = option("", "words")
    more: dict[str, str] = option({}, "anything")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()


def inner(**values: Any) -> Inner:
    return build(Outer, {"inner": values}).inner


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Inner()),
        ({"rate": 1}, Inner(rate=1.0)),
        ({"sizes": [4]}, Inner(sizes=(4,))),
        ({"pair": [2, 3.5]}, Inner(pair=(2.0, 3.5))),
        ({"limit": None}, Inner(limit=None)),
        ({"limit": 7}, Inner(limit=7)),
        ({"words": 1080}, Inner(words="1080")),
        ({"more": {"gres": "gpu:1", "nice": 5}}, Inner(more={"gres": "gpu:1", "nice": "5"})),
    ],
)
def test_good_values(values: dict[str, Any], expected: Inner) -> None:
    built = inner(**values)
    assert built == expected
    assert all(type(getattr(built, key)) is type(getattr(expected, key)) for key in values)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("count", 0, "an integer >= 1"),
        ("count", -2, "an integer >= 1"),
        ("count", 2.0, "an integer >= 1"),
        ("count", "2", "an integer >= 1"),
        ("count", True, "an integer >= 1"),
        ("count", None, "an integer >= 1"),
        ("rate", 0, "a number > 0 and <= 1"),
        ("rate", 1.5, "a number > 0 and <= 1"),
        ("rate", float("nan"), "a number > 0 and <= 1"),
        ("rate", 10**400, "a number > 0 and <= 1"),
        ("free", float("nan"), "a number"),
        ("free", float("inf"), "a number"),
        ("free", "1", "a number"),
        ("free", False, "a number"),
        ("shape", "oval", "round, square"),
        ("sizes", [], "a list, each an integer >= 1"),
        ("sizes", 3, "a list, each an integer >= 1"),
        ("sizes", [1, 0], "a list, each an integer >= 1"),
        ("sizes", [1, "2"], "a list, each an integer >= 1"),
        ("pair", [1.0], "a list of 2, each a number"),
        ("pair", [1.0, 2.0, 3.0], "a list of 2, each a number"),
        ("limit", 0, "an integer >= 1, or null"),
        ("flag", 1, "true or false"),
        ("flag", "yes", "true or false"),
        ("words", "a\nb", "text on one line, without '\\n' or other control characters"),
        ("words", "\x1b[2J", "text on one line, without '\\x1b' or other control characters"),
        ("words", "a\0", "text on one line, without '\\x00' or other control characters"),
        ("words", "\ud800", "text on one line, without '\\ud800' or other control characters"),
        ("words", "a\u2028b", "text on one line, without '\\u2028' or other control characters"),
        ("words", "x" * (MAX_TEXT + 1), f"text of at most {MAX_TEXT} characters"),
        ("words", True, "text"),
        ("words", None, "text"),
        ("more", ["gres"], "a mapping of names to values"),
    ],
)
def test_bad_values_name_key_value_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(SpecError) as caught:
        inner(**{key: value})
    assert str(caught.value).startswith(f"inner.{key}: {shown(value)} is not allowed; allowed: {allowed}.")


def test_unknown_keys_list_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"^inner\.cuont: unknown key; allowed in inner: count, .*did you mean 'count'"):
        inner(cuont=1)
    with pytest.raises(SpecError, match=r"^iner: unknown key; allowed in the spec: inner\. HINT: .*'inner'"):
        build(Outer, {"iner": {}})
    with pytest.raises(SpecError) as caught:
        inner(zzzzzz=1)
    assert "HINT" not in str(caught.value)


def test_misspelt_choices_get_a_hint() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'square'"):
        inner(shape="sqare")


@pytest.mark.parametrize("section", [3, "text", [1]])
def test_sections_must_be_mappings(section: Any) -> None:
    with pytest.raises(SpecError, match=r"^inner: .* is not allowed; allowed: a mapping"):
        build(Outer, {"inner": section})


def test_an_empty_section_is_all_defaults() -> None:
    assert build(Outer, {"inner": None}) == Outer() == build(Outer, None)


def test_mutable_defaults_are_not_shared() -> None:
    assert Inner().more is not Inner().more


@pytest.mark.parametrize("text", ["1.10", "1e3", "+5", "010", "0.50", "-0", ".5", "1_000", "2024-01-01", "1:30"])
def test_text_keys_keep_what_is_written(text: str) -> None:
    assert inner(**parse_yaml(f"words: {text}", "x")).words == text
    assert inner(**parse_yaml(f"more: {{gres-flags: {text}}}", "x")).more == {"gres-flags": text}


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "true", "False"])
def test_a_word_that_yaml_takes_for_a_switch_is_refused_with_the_cure(text: str) -> None:
    with pytest.raises(SpecError, match=r"inner\.words: (True|False) .* allowed: text\. HINT: put it in quotes"):
        inner(**parse_yaml(f"words: {text}", "x"))


def test_options_without_a_value() -> None:
    assert inner(**parse_yaml("more: {hold: yes, exclusive: no}", "x")).more == {"hold": "true", "exclusive": "false"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hold": None}, r"inner\.more\.hold: None is not allowed; allowed: text"),
        ({"hold": {"a": 1}}, r"inner\.more\.hold: \{'a': 1\} is not allowed; allowed: text"),
        ({"hold": "a\rb"}, r"inner\.more\.hold: 'a\\rb' is not allowed"),
        ({1: "a"}, r"inner\.more: the key 1 is not allowed"),
        ({"a\nb": "c"}, r"inner\.more: the key 'a\\nb' is not allowed"),
    ],
)
def test_bad_options(more: dict[Any, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        inner(more=more)
