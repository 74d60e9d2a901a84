"""Specs from and to YAML, --set, differences, and names of runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.config import yaml_loader
from cifar_hpc.config.io import (
    check_resumable,
    differences,
    from_plain,
    load_spec,
    load_values,
    merge,
    run_name,
    to_plain,
    to_yaml,
)
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.yaml_loader import parse_yaml, read_mapping, read_sections
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.paths import check_run_name, project_root


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("1-12", "1-12"),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("5.e2", 500.0),
        (".5", 0.5),
        ("-2.5", -2.5),
        ("30", 30),
        ("-3", -3),
        ("0", 0),
        ("010", "010"),  # not eight
        ("08", "08"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("e5", "e5"),
        ("2024-01-01", "2024-01-01"),  # not a date
        ("2024-02-30", "2024-02-30"),
        ("=", "="),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2e0]", [1, 2.0]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert isinstance(parsed, type(value)) and isinstance(parsed, bool) is isinstance(value, bool)


def test_nan_is_read_and_then_refused(tmp_path: Path) -> None:
    assert parse_yaml(".nan", "x") != parse_yaml(".nan", "x")
    job = tmp_path / "a.yaml"
    job.write_text("optimizer: {lr: .nan}\n")
    with pytest.raises(SpecError, match=r"^optimizer\.lr: nan is not allowed"):
        load_spec(job)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\ntrain: {epochs: 2}", r"'train' is given twice.*line 2"),
        ("train:\n  epochs: 1\n  epochs: 2", r"'epochs' is given twice.*line 3"),
        ("train: [1", r"not readable as YAML.*line 1"),
        ("[1]: 2", r"unhashable"),
        ("? {a: 1}\n: 2", r"unhashable"),
        ("a: " + "[" * 5000, r"nested too deeply"),
        ("a: &a [*a]", r"cannot hold itself.*line 1"),
        ("a: !!python/object:os.system x", r"could not determine a constructor .*python/object:os\.system"),
        ("a: !!python/object/apply:os.system [x]", r"python/object/apply:os\.system"),
        ("a: !!bool maybe", r"not of the type that its !!tag says"),
        ("a: !!int", r"not of the type"),
        ("a: !!float", r"not of the type"),
        ("a: !!timestamp x", r"not of the type"),
        ("a: \x1b[31m", r"special characters are not allowed"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    job = tmp_path / "bad.yaml"
    job.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        read_mapping(job)
    assert str(job) in str(caught.value)


def test_merge_keys_of_yaml_work() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x")["b"] == {"x": 1, "y": 3}


def test_files(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\xff")
    assert read_mapping(tmp_path / "demo.yaml") == {}
    for name, message in {
        "dmeo.yaml": r"No such file.*did you mean 'demo\.yaml'",
        "list.yaml": r"holds \[1\]; allowed: a mapping",
        "binary.yaml": r"is no text file",
        "no/such.yaml": r"No such file",
    }.items():
        with pytest.raises(SpecError, match=message):
            read_mapping(tmp_path / name)


def job_file(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=7", "epochs", 7),
        (" train.epochs =7", "epochs", 7),
        ("train.shards=null", "shards", None),
        ("train.shards=", "shards", None),
        ("train.deterministic=false", "deterministic", False),
        ("train.log_seconds=1e-1", "log_seconds", 0.1),
        ("train.amp=bf16", "amp", "bf16"),
        ("train={epochs: 7}", "epochs", 7),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: str, value: Any) -> None:
    spec = load_spec(job_file(tmp_path, "train: {epochs: 3, shards: 2}"), [override])
    assert getattr(spec.train, key) == value
    assert spec.train.batch_size == 128


def test_overrides_of_lists_texts_and_open_mappings(tmp_path: Path) -> None:
    overrides = ["model.blocks=[1, 2, 1]", "resources.time=1-00", "resources.sbatch.gres=gpu:2", "data.root=a=b"]
    spec = load_spec(job_file(tmp_path), overrides)
    assert spec.model.blocks == (1, 2, 1)
    assert (spec.resources.time, spec.resources.sbatch, spec.data.root) == ("1-00", {"gres": "gpu:2"}, "a=b")


def test_job_over_base_and_the_last_override_wins(tmp_path: Path) -> None:
    job = job_file(tmp_path, "resources: {partition: gpu}")
    base = {"resources": {"partition": "all", "account": "us"}}
    spec = from_plain(load_values(job, ["train.epochs=1", "train.epochs=2"], base))
    assert (spec.resources.partition, spec.resources.account, spec.train.epochs) == ("gpu", "us", 2)
    assert base == {"resources": {"partition": "all", "account": "us"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", r"--set train\.epochs: not understood"),
        ("=3", r"not understood"),
        ("train.epochs=[", r"--set train\.epochs: not readable as YAML"),
        ("train.epohcs=3", r"train\.epohcs: unknown key.*did you mean 'epochs'"),
        ("trian.epochs=3", r"trian: unknown key.*did you mean 'train'"),
        ("train.epochs=ten", r"train\.epochs: 'ten' is not allowed; allowed: an integer >= 1"),
        ("train.seed=08", r"train\.seed: '08' is not allowed"),
        ("train.epochs.x=3", r"train\.epochs: \{'x': 3\} is not allowed"),
        ("train=3", r"train: 3 is not allowed; allowed: a mapping"),
        ("train..epochs=3", r"train\.: unknown key"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec(job_file(tmp_path), [override])


def test_merge_changes_neither_side() -> None:
    below, above = {"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "b": {"z": 3}}
    assert merge(below, above) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert (below, above) == ({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "b": {"z": 3}})


AWKWARD = [
    "1e4",
    "24:00:00",
    "010",
    "12",
    "1_0",
    "0x1f",
    "yes",
    "null",
    "~",
    "2024-01-01",
    "a: b",
    "# x",
    " x ",
    "é日😀",
    "a\\b'\"",
    "",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_yaml_round_trip(tmp_path: Path, text: str) -> None:
    spec = tiny_spec(
        resources={"comment": text, "sbatch": {"wckey": text}}, optimizer={"lr": 1e-5}, train={"log_seconds": 1 / 3}
    )
    job = job_file(tmp_path, to_yaml(spec, "two\nlines"))
    assert load_spec(job) == spec
    assert job.read_text().startswith("# two\n# lines\n")


def test_plain_round_trip() -> None:
    spec = tiny_spec(model={"widths": [64, 128, 64]}, resources={"sbatch": {"wckey": "b"}})
    assert from_plain(to_plain(spec)) == spec
    assert to_plain(spec)["model"]["widths"] == [64, 128, 64]


def test_run_name_golden_values() -> None:
    """Names are where a run's files lie: a change of the naming would orphan every run."""
    assert run_name("improved_resnet", Spec()) == "improved_resnet-44136fa3"
    assert run_name("demo", tiny_spec()) == "demo-579a78f6"


@pytest.mark.parametrize(
    "sections",
    [
        {"resources": {"partition": "gpu", "time": "10", "nodes": "2", "gpus_per_node": 4, "sbatch": {"wckey": "b"}}},
        {"checkpoint": {"every_steps": 5, "keep": 9}},
        {"failures": {"max": 9}, "timeouts": {"max": 9}},
        {"data": {"root": "/elsewhere"}},
        {"train": {"log_seconds": 1}},
        {"train": {"epochs": 2}},  # as it is already
    ],
)
def test_run_name_leaves_out_what_does_not_change_the_result(sections: dict[str, Any]) -> None:
    assert run_name("demo", tiny_spec(**sections)) == run_name("demo", tiny_spec())


@pytest.mark.parametrize(
    "sections",
    [{"train": {"seed": 1}}, {"optimizer": {"lr": 0.1}}, {"data": {"train_size": 100}}, {"augment": {"flip": 0}}],
)
def test_run_name_follows_what_changes_the_result(sections: dict[str, Any]) -> None:
    assert run_name("demo", tiny_spec(**sections)) != run_name("demo", tiny_spec())


def test_differences() -> None:
    assert differences(tiny_spec(), tiny_spec()) == {}
    new = tiny_spec(train={"seed": 5}, resources={"sbatch": {"wckey": "b"}})
    found = differences(tiny_spec(), new)
    assert found["train.seed"] == (0, 5)
    assert found["resources.sbatch.wckey"] == (None, "b")
    assert set(found) == {"train.seed", "resources.sbatch.wckey"}, "no null in place of the empty mapping"
    assert set(differences(new, tiny_spec())) == set(found)


def test_resuming_under_another_spec_lists_every_key() -> None:
    with pytest.raises(SpecError) as caught:
        check_resumable(tiny_spec(), tiny_spec(train={"seed": 5, "epochs": 9}, optimizer={"lr": 0.1}), "demo-1")
    text = str(caught.value)
    assert text.startswith("run demo-1: ")
    assert "  optimizer.lr: 0.05 -> 0.1\n  train.seed: 0 -> 5\n" in text
    assert "train.epochs:" not in text


def test_what_may_change_on_resuming() -> None:
    new = tiny_spec(
        train={"epochs": 9, "device": "cuda", "shards": None, "cpu_threads": None, "log_seconds": 1},
        checkpoint={"keep": 9},
        resources={"nodes": "4"},
        data={"root": "x"},
        failures={"max": 0},
    )
    check_resumable(tiny_spec(), new, "demo-1")


@pytest.mark.parametrize("key", ["shards", "cpu_threads"])
def test_a_resolved_value_may_be_left_open_but_not_changed(key: str) -> None:
    other = dataclasses.replace(tiny_spec(), train=dataclasses.replace(tiny_spec().train, **{key: 3}))
    with pytest.raises(SpecError, match=rf"train\.{key}: \d -> 3"):
        check_resumable(tiny_spec(), other, "demo-1")


@pytest.mark.parametrize("name", ["a", "demo-1a2b3c4d", "A.b_c-9", "x" * 100])
def test_good_run_names(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "a\n", "é", "x" * 101, "..", "$(x)"])
def test_bad_run_names(name: str) -> None:
    with pytest.raises(SpecError, match="--name"):
        check_run_name(name)


def test_the_folder_of_images_names_the_run_only_where_it_says_which_images() -> None:
    def name(source: str, root: str) -> str:
        return run_name("j", from_plain({"data": {"source": source, "root": root}}))

    assert name("folder", "/a") != name("folder", "/b")
    assert name("cifar10", "/a") == name("cifar10", "/b")


def test_home_and_variables_in_the_path_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def root(text: str) -> str:
        return load_spec(job_file(tmp_path), [f"data.root={text}"]).data.root

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$me")
    assert [root(text) for text in ("'~'", "~/data", "$SCRATCH/data", "'${SCRATCH}data'")] == [
        "/home/me", "/home/me/data", "/scratch/$me/data", "/scratch/$medata",
    ]  # fmt: skip
    assert [root(text) for text in ("data", "/a//b/../c/", "a~b", "a$", "./~x")] == [
        "data", "/a//b/../c/", "a~b", "a$", "./~x",
    ]  # fmt: skip
    monkeypatch.setenv("EMPTY", "")
    for name in ("NO_SUCH", "EMPTY"):
        with pytest.raises(
            SpecError, match=rf"^data\.root: '\${name}/data' needs the variable {name}, which is not set"
        ):
            root(f"${name}/data")
    with pytest.raises(SpecError, match=r"^data\.root: '~nobody-here/x' names no user"):
        root("~nobody-here/x")
    monkeypatch.setenv("CIFAR_HPC_ROOT", "$NO_SUCH/runs")
    with pytest.raises(SpecError, match=r"^CIFAR_HPC_ROOT: .* needs the variable NO_SUCH"):
        project_root()
    monkeypatch.setenv("CIFAR_HPC_ROOT", "~/runs")
    assert project_root() == Path("/home/me/runs")
    monkeypatch.setenv("CIFAR_HPC_ROOT", "/a $HOME")
    assert project_root() == Path("/a $HOME")


@pytest.mark.parametrize(
    "text",
    [
        to_yaml(tiny_spec(), "A spec.\nOf two lines."),
        "", "# only a comment\n", "a: {b: 1}\nc: [2]\n", "a:\n- 1\nb: |\n  text\n\n  c: 3\nd: 1e4\n",
        "a: 1\na: 2\n", "a: 1\nA: 2\n", "  a: 1\n", "---\na: 1\n", "- 1\n", "words\n", "words\nand more\n",
        "a: [1,\nb: 2\n", "a: &x 1\nb: *x\n", "{a: 1,\nb: 2}\n", "a: 'x\n\n  b: 1'\nc: 2\n", "a: 'x\nb: 1'\nc: 2\n",
        "\ufeffa: 1\n", "a: 1\n...\nb: 2\n",
    ],
)  # fmt: skip
def test_a_file_that_is_read_by_sections_is_what_it_is_as_a_whole(tmp_path: Path, text: str) -> None:
    def outcome(read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except SpecError as error:
            return str(error)

    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert outcome(read_sections) == outcome(read_sections) == outcome(read_mapping)


def test_equal_sections_of_many_files_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.yaml").write_text(to_yaml(tiny_spec(train={"seed": 1}), "One."))
    (tmp_path / "two.yaml").write_text(to_yaml(tiny_spec(train={"seed": 2}), "Two."))
    parsed: list[str] = []
    parse = functools.lru_cache(lambda text, name: parsed.append(text) or parse_yaml(text, name))
    monkeypatch.setattr(yaml_loader, "_parsed", parse)
    one, two = read_sections(tmp_path / "one.yaml"), read_sections(tmp_path / "two.yaml")
    assert (one["train"]["seed"], two["train"]["seed"]) == (1, 2)
    assert len(parsed) == len(one) + 1 and parsed[-1].startswith("train:")
