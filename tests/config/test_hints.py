"""Hints are right: who follows one gets no other error, and what one names is there."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PROJECT

from cifar_hpc.cli import parser
from cifar_hpc.cli.submit import build_parser
from cifar_hpc.config.io import from_plain, load_spec, load_values, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.sweep import Point, expand
from cifar_hpc.errors import SpecError
from cifar_hpc.launch.preflight import check_this_machine
from cifar_hpc.runs.frozen_spec import resolve
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.slurm.options import RESERVED

KEYS = {f"{section}.{key}" for section, values in to_plain(Spec()).items() for key in values}


def submitted(job: Path, overrides: list[str]) -> list[Point]:
    """The runs that submit.py would submit."""
    values = load_values(job, overrides)
    section = values.pop("sweep", None)
    if section is None:
        return [Point("", {}, from_plain(values))]
    return expand("job", section, values, [override.partition("=")[0] for override in overrides])[0]


def hint_of(job: Path, overrides: list[str]) -> str:
    with pytest.raises(SpecError, match=" HINT: ") as caught:
        submitted(job, overrides)
    return str(caught.value).partition(" HINT: ")[2]


def overrides_in(hint: str) -> list[str]:
    """What a hint would have one write after --set, without the quotes that a shell takes away."""
    return [quoted or bare for quoted, bare in re.findall(r"--set (?:'([^']+)'|([^\s',;]*[^\s',;.]))", hint)]


@pytest.mark.parametrize(
    ("section", "given", "dots"),
    [
        ("{seeds: 3}", "train.seed=7", "7"),
        ("{seeds: 3}", "train={seed: 7}", "7"),
        ("{seeds: [1, 2], grid: {model.dropout: [0, 0.1]}}", "train.seed=7", "7"),
        ("{grid: {train.seed: [1, 2]}}", "train.seed=7", "7"),
        ("{grid: {model.dropout: [0, 0.1]}, seeds: 2}", "model.dropout=0.5", "0.5"),
        ("{zip: {model.dropout: [0], optimizer.lr: [0.1]}}", "model.dropout=0.5", "0.5"),
        ("{list: [{model.dropout: 0}, {model.dropout: 0.1}]}", "model.dropout=0.5", "0.5"),
    ],
)
def test_what_is_said_to_who_sets_what_a_sweep_varies(tmp_path: Path, section: str, given: str, dots: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"sweep: {section}\n")
    itself, alone = overrides_in(hint_of(job, ["train.epochs=9", given]))
    key, value = ("train.seed", 7) if "seed" in given else ("model.dropout", 0.5)
    points = submitted(job, ["train.epochs=9", itself.replace("...", dots)])
    assert points and all(point.values[key] == value and point.spec.train.epochs == 9 for point in points)
    (point,) = submitted(job, ["train.epochs=9", given, alone])
    assert value in (point.spec.train.seed, point.spec.model.dropout)


def test_what_is_said_of_keys_that_make_no_other_run(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("sweep: {seeds: 2, grid: {checkpoint.keep: [1, 2]}}\n")
    assert "leave it out of the sweep, and set it for all with --set" in hint_of(job, [])
    job.write_text("sweep: {seeds: 2}\n")
    assert [point.spec.checkpoint.keep for point in submitted(job, ["checkpoint.keep=2"])] == [2, 2]


@pytest.mark.parametrize("key", ["resources.time", "train.device"])
def test_what_is_said_of_keys_of_the_array(tmp_path: Path, key: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"sweep: {{seeds: 2, grid: {{{key}: [cpu]}}}}\n")
    # --name as well: resources are no part of a name, so that the second would be the first again.
    assert "submit once for each value, with --set and a --name of its own" in hint_of(job, [])


@pytest.mark.parametrize("second", ["every_minutes=5", "every_steps=5"])
def test_what_is_said_to_who_gives_two_intervals(tmp_path: Path, second: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("checkpoint: {every: auto}\n")
    overrides = [f"checkpoint.{second}"]
    (cure,) = overrides_in(hint_of(job, overrides))
    assert submitted(job, [*overrides, cure])[0].spec.checkpoint.every is None


@pytest.mark.parametrize("word", ["yes", "off", "true"])
def test_what_is_said_of_words_that_are_switches(tmp_path: Path, word: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("")
    hint = hint_of(job, [f"resources.comment={word}"])
    (cure,) = overrides_in(hint)
    assert submitted(job, [cure.replace("...", word)])[0].spec.resources.comment == word
    job.write_text(f"resources: {{comment: '{word}'}}")
    assert "put it in quotes" in hint and load_spec(job).resources.comment == word


def test_what_is_said_of_more_processes_than_shards(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("train: {shards: 2}\n")
    with pytest.raises(SpecError, match=" HINT: ") as caught:
        resolve(RunPaths(tmp_path, "old"), load_spec(job), 4, 1)
    (cure,) = overrides_in(str(caught.value))
    assert resolve(RunPaths(tmp_path, "new"), load_spec(job, [cure]), 4, 1).train.shards == 4
    assert "at most 2 ranks" in str(caught.value)
    assert resolve(RunPaths(tmp_path, "old"), load_spec(job), 2, 1).train.shards == 2


def test_what_is_said_where_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_hpc.launch.preflight.DEVICES", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    job = tmp_path / "job.yaml"
    job.write_text("")
    with pytest.raises(SpecError, match=" HINT: ") as caught:
        check_this_machine(load_spec(job))
    (cure,) = overrides_in(str(caught.value))
    check_this_machine(load_spec(job, [cure]))


# ------------------------------------------------------------------ what hints name


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every hint in the package; what is filled in is `{}`."""
    for path in sorted((PROJECT / "cifar_hpc").rglob("*.py")):
        tree = ast.parse(path.read_text())
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        inner = {id(part) for node in joined for part in node.values}
        plain = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in inner]
        for node in (*joined, *plain):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            if "HINT: " in text:
                yield f"{path.name}:{node.lineno}", text.partition("HINT: ")[2]
    for option, instead in RESERVED.items():
        yield f"sbatch's option {option}", instead


def options() -> set[str]:
    """Every option of submit.py and of all commands."""
    (commands,) = (a for a in parser.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers = (build_parser(), *commands.choices.values())
    return {option for one in parsers for action in one._actions for option in action.option_strings}


def test_what_hints_name_is_there() -> None:
    names = {path.rpartition(".")[2] for path in parser.COMMANDS}
    sections = "|".join(to_plain(Spec()))
    makefile = (PROJECT / "Makefile").read_text()
    known = options()
    wrong = []
    found = list(texts())
    for where, hint in found:
        keys = re.findall(rf"\b(?:{sections})\.[a-z_]+\b(?!\()", hint) + re.findall(
            r"--set '?([a-z_]+\.[a-z_.]+)", hint
        )
        wrong += [
            (where, key) for key in keys if key not in KEYS and key != "train.log" and not key.startswith("sweep.")
        ]
        wrong += [(where, name) for name in re.findall(r"-m cifar_hpc ([a-z]+)", hint) if name not in names]
        wrong += [(where, goal) for goal in re.findall(r"\bmake ([a-z]+) &&", hint) if f"\n{goal}:" not in makefile]
        wrong += [(where, option) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", hint) if option not in known]
        wrong += [(where, name) for name in re.findall(r"\b[a-z-]+\.txt\b", hint) if not (PROJECT / name).is_file()]
    assert wrong == [] and len(found) > 60
