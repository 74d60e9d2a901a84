"""Every number of a spec has bounds, and every spec within them can be written, read back and resumed."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import blank_state
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.config.fields import MAX_TEXT, describe
from cifar_hpc.config.io import check_resumable, from_plain, load_spec, nested, run_name, to_plain, to_yaml
from cifar_hpc.config.spec import IMAGE_SIZE, LEAST_WIDTH, OPTIMIZERS, TARGET_KEYS, Spec
from cifar_hpc.config.yaml_loader import parse_yaml
from cifar_hpc.errors import SpecError
from cifar_hpc.files import replacing
from cifar_hpc.runs.frozen_spec import freeze, require_frozen
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.tensorfile import load, save
from cifar_hpc.text import control_character, shown


class Field(typing.NamedTuple):
    """A key of the spec: its dotted name, its type without null, whether it may be null, its bounds."""

    key: str
    hint: Any
    null: bool
    metadata: typing.Mapping[str, Any]

    @property
    def number(self) -> Any:
        """Return int or float for a number or a list of them, else None."""
        kind = typing.get_args(self.hint)[0] if typing.get_origin(self.hint) is tuple else self.hint
        return kind if kind in (int, float) else None


def fields(cls: Any = Spec, prefix: str = "") -> Iterator[Field]:
    """Every key, however deep."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{field.name}.")
            continue
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        null = type(None) in kinds
        yield Field(prefix + field.name, next(k for k in kinds if k is not type(None)), null, field.metadata)


FIELDS = list(fields())
# resources.gpus_per_node may be text, too, such as a100:4: see test_spec.
NUMBERS = [field for field in FIELDS if field.number and field.key != "resources.gpus_per_node"]


def test_the_schema_has_been_read_as_a_whole() -> None:
    assert len(FIELDS) == sum(len(section) for section in to_plain(Spec()).values())
    assert {field.key for field in NUMBERS} >= {"lookahead.k", "model.widths", "augment.erasing_ratio", "failures.max"}


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.key)
def test_every_number_has_bounds_that_torch_can_hold(field: Field) -> None:
    low, above, high = (field.metadata[bound] for bound in ("low", "above", "high"))
    assert (low is None) != (above is None), "a lower bound, one"
    assert -(2**31) <= (low if low is not None else above) < high <= (2**31 - 1 if field.number is int else 1e38)


# As --set takes them; no key takes any of the first group, and one of whole numbers none of the second.
NO_NUMBERS = (
    "1" + "0" * 400, "1" + "0" * 4295, "1" + "0" * 5000, "1e400", "-1e400", ".inf", "-.inf", ".nan", "true", "'5'",
    "0x10", "1_000", "[]", "{a: 1}", "-1",
)  # fmt: skip
NO_INTEGERS = (str(2**31), str(2**63), str(-(2**63)), "1.5", "1e3")


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.key)
def test_what_is_no_number_of_the_range_is_refused_with_the_range(field: Field) -> None:
    for text in NO_NUMBERS + (NO_INTEGERS if field.number is int else ()):
        value = parse_yaml(text, "--set")
        if typing.get_origin(field.hint) is tuple:
            value = [value] * (2 if field.number is float else 1)
        with pytest.raises(SpecError) as caught:
            from_plain(nested(field.key, value))
        message = str(caught.value)
        assert message.startswith(f"{field.key}: {shown(value)} is not allowed; allowed: "), text
        assert describe(field.hint, field.metadata) in message and len(message) < 500


@pytest.mark.parametrize("field", [field for field in NUMBERS if field.number is float], ids=lambda field: field.key)
def test_minus_zero_is_zero(field: Field) -> None:
    if field.metadata["low"] is None or isinstance(field.hint, types.GenericAlias):
        return
    spec = from_plain(nested(field.key, parse_yaml("-0.0", "--set")))
    assert run_name("j", spec) == run_name("j", from_plain(nested(field.key, 0)))
    assert "-0.0" not in to_yaml(spec, "")


def numbers(field: Field) -> st.SearchStrategy[Any]:
    """The ends of the range, and what lies between."""
    low, above, high = (field.metadata[bound] for bound in ("low", "above", "high"))
    if field.number is int:
        return st.sampled_from([low, high]) | st.integers(low, high)
    inside = st.floats(low if above is None else above, high, exclude_min=above is not None)
    return st.sampled_from([high, low if above is None else math.nextafter(above, high)]) | inside


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]).filter(lambda c: control_character(c) is None), max_size=60
) | st.sampled_from(
    ["1e4", "0x1f", "yes", "null", "~", "- a", "a: b", "'", '"', "\\", " ", "é😀", "\ufeff", "x" * MAX_TEXT]
)
OPTIONS = st.from_regex(r"\A(wckey|licenses|nice|x-[a-z0-9]{1,5})\Z")
OF_A_FORM: dict[str, st.SearchStrategy[Any]] = {
    "train.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:999"]),
    "resources.time": st.sampled_from(["1", "999999999", "24:00:00", "010", "1-12", "365-00:00:00"]),
    "resources.nodes": st.sampled_from(["1", "2-4", "999999", "1-999999"]),
    "resources.mem": st.sampled_from(["32G", "1000", "0"]),
    "resources.dependency": st.sampled_from(["afterok:1", "after:12+5,afterany:7"]),
    "resources.sbatch": st.dictionaries(OPTIONS, TEXT | st.booleans() | st.integers(), max_size=4),
    "data.root": st.sampled_from(["data", "/a b/é", "a=b", "1e4", ".", "x" * MAX_TEXT]),
}


def values(field: Field) -> st.SearchStrategy[Any]:
    if field.key in OF_A_FORM:
        plain = OF_A_FORM[field.key]
    elif typing.get_origin(field.hint) is typing.Literal:
        plain = st.sampled_from(typing.get_args(field.hint))
    elif typing.get_origin(field.hint) is tuple:
        size = 2 if field.number is float else 3
        plain = st.lists(numbers(field), min_size=size, max_size=size).map(sorted)
    else:
        plain = st.booleans() if field.hint is bool else TEXT if field.hint is str else numbers(field)
    return st.none() | plain if field.null else plain


# Keys that need files of a user's own, and those that are filled in from them: see tests/training/test_own_networks.py.
OF_FILES = {f"model.{key}" for key in TARGET_KEYS} | {f"data.{key}" for key in ("target", "args", "code")}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec without a user's own files: some keys are drawn, and those that contradict them are moved to fit."""
    given: dict[str, Any] = {f.key: draw(values(f)) for f in FIELDS if f.key not in OF_FILES and draw(st.booleans())}
    for key, other in {
        "checkpoint.every_minutes": "checkpoint.every", "checkpoint.every_steps": "checkpoint.every_minutes",
        "data.holdout": "data.test_size",
    }.items():  # fmt: skip
        if given.get(other) is not None:
            given[key] = None
    if given.get("checkpoint.every") is not None:
        given["checkpoint.every_steps"] = None
    if given.get("train.compile") or given.get("train.amp") == "fp16":
        given.pop("train.graph", None)
    if given.get("train.compile"):
        given["train.deterministic"] = False
    name = given.get("optimizer.name", "sgd")
    for other in (key for one, (_, keys) in OPTIMIZERS.items() if one != name for key in keys):
        given.pop(f"optimizer.{other}", None)
    if given.get("optimizer.momentum") == 0:
        given["optimizer.nesterov"] = False
    given["train.batch_size"] = max(given.get("train.batch_size") or 128, given.get("train.shards") or 1)
    given["schedule.warmup_epochs"] = min(given.get("schedule.warmup_epochs", 0), given.get("train.epochs", 400) / 2)
    given["resizing.finetune"] = min(given.get("resizing.finetune", 0.2), 1 - given.get("resizing.delay", 0.5))
    size = given.get("data.image_size") or IMAGE_SIZE
    for key, usual, most in (
        ("resizing.initial", None, size), ("resizing.increment", 4, size), ("augment.crop_padding", 4, size - 1),
    ):  # fmt: skip
        if given.get(key, usual) is not None:
            given[key] = min(given.get(key, usual), most)
    layers = min(3, ((given.get("resizing.initial") or size) - 1).bit_length())
    given["model.blocks"] = given.get("model.blocks", [3, 3, 3])[:layers]
    scale = given["model.width_multiplier"] = max(given.get("model.width_multiplier", 1.0), LEAST_WIDTH / 100_000)
    least = math.ceil(LEAST_WIDTH / scale)
    given["model.widths"] = [max(least, width) for width in given.get("model.widths", [4, 5, 6])][:layers]
    plain: dict[str, Any] = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        plain.setdefault(section, {})[name] = value
    return from_plain(plain)


def same(one: Spec, two: Spec) -> bool:
    """Return whether two specs are equal in values and types."""
    return one == two and repr(one) == repr(two)


@given(specs())
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_what_is_written_is_read_back_and_resumes(spec: Spec) -> None:
    assert same(from_plain(to_plain(spec)), spec)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        job = root / "job.yaml"
        job.write_text(to_yaml(spec, "a\nheader"), encoding="utf-8")
        assert same(load_spec(job), spec)
        paths = RunPaths(root, "run")
        paths.create()
        freeze(paths, spec)
        frozen = require_frozen(paths)
        assert same(frozen, spec) and run_name("j", frozen) == run_name("j", spec)
        state = blank_state(spec=to_plain(spec))
        with replacing(root / "step_1.pt") as file:
            save(state.to_dict(), file)
        again = from_plain(load(root / "step_1.pt")["spec"])
    assert same(again, spec)
    for new in (again, frozen, dataclasses.replace(spec, checkpoint=Spec().checkpoint)):
        check_resumable(spec, new, "run")
