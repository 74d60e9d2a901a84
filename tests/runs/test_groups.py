"""Which runs belong together, and by what they are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.config.io import in_words
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.results import Group, group_runs, labels, settings, shared_label

Make = Callable[..., RunPaths]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(name: str, **sections: dict[str, Any]) -> RunPaths:
        paths = RunPaths(tmp_path, name)
        paths.create()
        freeze(paths, tiny_spec(**sections), tmp_path)
        return paths

    return run


def test_runs_that_differ_in_the_seed_alone_are_one_group(make: Make) -> None:
    runs = [make("a", train={"seed": 2}), make("b", train={"seed": 0}), make("c", train={"seed": 1})]
    assert group_runs(runs) == [Group((runs[1], runs[2], runs[0]), {}, (0, 1, 2))]


def test_each_run_apart_makes_the_seed_a_key(make: Make) -> None:
    runs = [make("a", train={"seed": 2}), make("b", train={"seed": 0})]
    assert group_runs(runs, each=True) == [
        Group((runs[1],), {"train.seed": 0}, (0,)),
        Group((runs[0],), {"train.seed": 2}, (2,)),
    ]


def test_changed_keys_are_those_in_which_the_given_runs_differ(make: Make) -> None:
    runs = [
        make(f"r{rate}-{seed}", model={"dropout": rate, "activation": "relu"}, train={"seed": seed})
        for rate in (0.5, 0.1)
        for seed in (0, 1)
    ]
    groups = group_runs(runs)
    assert [(g.changed, g.seeds) for g in groups] == [
        ({"model.dropout": 0.1}, (0, 1)),
        ({"model.dropout": 0.5}, (0, 1)),
    ]
    assert labels(groups) == ["dropout 0.1", "dropout 0.5"]


def test_what_does_not_decide_about_results_is_no_difference(make: Make) -> None:
    runs = [
        make("a"),
        make(
            "b",
            train={"device": "cuda", "cpu_threads": 4, "log_seconds": 9, "watchdog_minutes": 3},
            data={"root": "elsewhere"},
            checkpoint={"every_steps": 7},
            resources={"partition": "gpu", "gpus_per_node": 1},
            failures={"max": 9},
            timeouts={"max": 9},
        ),
    ]
    assert group_runs(runs) == [Group(tuple(runs), {}, (0, 0))]


def test_epochs_are_a_difference(make: Make) -> None:
    groups = group_runs([make("a", train={"epochs": 9}), make("b", train={"epochs": 10})])
    assert labels(groups) == ["epochs 9", "epochs 10"]


def test_another_folder_of_images_is_a_difference(make: Make) -> None:
    groups = group_runs([make(name, data={"source": "folder", "root": name}) for name in ("one", "two")])
    assert [g.changed for g in groups] == [{"data.root": "one"}, {"data.root": "two"}]


def test_a_run_that_has_not_started_has_no_shards_to_differ_in(make: Make) -> None:
    waiting = make("a", train={"shards": None})
    assert len(group_runs([waiting, make("b")])) == 1
    assert len(group_runs([waiting, make("b"), make("c", train={"shards": 2})])) == 3


def test_a_run_whose_spec_cannot_be_read_stands_alone_with_the_reason(make: Make, tmp_path: Path) -> None:
    good, damaged, foreign = make("good"), make("damaged"), make("foreign")
    damaged.spec.write_text("train: [")
    foreign.spec.write_text("of_another_version: 1\n")
    missing = RunPaths(tmp_path, "missing")
    groups = group_runs([missing, foreign, damaged, good])
    assert groups[0] == Group((good,), {}, (0,))
    problems = {g.runs[0].name: g.problem for g in groups[1:]}
    assert problems.keys() == {"missing", "foreign", "damaged"}
    assert "is not there" in problems["missing"]
    assert "of_another_version: unknown key" in problems["foreign"]
    assert "not readable as YAML" in problems["damaged"]


def test_no_runs_are_no_groups() -> None:
    assert group_runs([]) == []


def test_groups_stand_in_the_order_of_their_values(make: Make) -> None:
    runs = [
        make(f"r{number}", data={"train_size": size}, model={"blocks": blocks})
        for number, (size, blocks) in enumerate(
            [(500, [2, 1, 1]), (None, [2, 1, 1]), (64, [10, 1, 1]), (64, [2, 2, 1])]
        )
    ]
    assert labels(group_runs(runs)) == [
        "blocks [2, 1, 1], train_size null",
        "blocks [2, 1, 1], train_size 500",
        "blocks [2, 2, 1], train_size 64",
        "blocks [10, 1, 1], train_size 64",
    ]


def test_keys_of_one_last_part_are_told_apart_in_full(make: Make) -> None:
    paths = make("a")
    groups = [Group((paths,), {"failures.max": 1, "timeouts.max": 2}), Group((paths,), {"failures.max": 2})]
    assert labels(groups)[0] == "failures.max 1, timeouts.max 2"


def test_where_words_do_not_tell_runs_apart_their_names_do(make: Make) -> None:
    same = [make("a"), make("b")]
    assert labels(group_runs(same, each=True)) == ["a", "b"]
    close = [make("c", optimizer={"lr": 0.1}), make("d", optimizer={"lr": 0.1000000001})]
    assert labels(group_runs(close)) == ["c lr 0.1", "d lr 0.1"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), (True, "true"), (1e-4, "0.0001"), (3, "3"), ("relu", "relu"), ([1, 2.5], "[1, 2.5]")],
)
def test_values_read_as_in_yaml(value: Any, words: str) -> None:
    assert in_words(value) == words


ELEMENTS: list[dict[str, dict[str, Any]]] = [
    {},
    {"optimizer": {"nesterov": True}},
    {"lookahead": {"enabled": False}, "ema": {"decay": 0.99}},
    {"train": {"label_smoothing": 0.0}},
    {"augment": {"trivial": True}},
    {"mixing": {"mixup": 0.2}},
]


def test_groups_that_differ_in_many_keys_are_told_by_what_is_not_as_in_most(make: Make) -> None:
    groups = group_runs([make(f"run-{n}", **sections) for n, sections in enumerate(ELEMENTS)])
    found = dict(zip([group.runs[0].name for group in groups], labels(groups), strict=True))
    assert list(dict(sorted(found.items())).values()) == [
        "base",
        "optimizer.nesterov=true",
        "lookahead.enabled=false ema.decay=0.99",
        "train.label_smoothing=0",
        "augment.trivial=true",
        "mixing.mixup=0.2",
    ]
    assert settings(groups) == labels(groups)
    assert shared_label(groups) == ""


def test_a_run_that_cannot_be_read_has_no_settings(make: Make) -> None:
    runs = [make(f"run-{n}", **sections) for n, sections in enumerate(ELEMENTS)]
    runs[0].spec.write_text("broken: [")
    groups = group_runs([*runs, make("other")])
    assert [settings(groups)[n] for n, group in enumerate(groups) if group.problem] == [""]
    assert [labels(groups)[n] for n, group in enumerate(groups) if group.problem] == ["run-0"]


def test_networks_differ_by_their_names_and_arguments(make: Make, tmp_path: Path) -> None:
    plain = {"blocks": [3, 3, 3], "dropout": 0.2, "width_multiplier": 1.0}  # as the defaults are
    nets = {"one": ({}, "0011"), "two": ({"width": 8}, "2233"), "three": ({"width": 8}, "4455")}
    targets = {"one": "a.py:A", "two": "b.py:B", "three": "b.py:B"}
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("class A: pass\nclass B: pass\n")
    runs = {
        name: make(name, model={**plain, "target": targets[name], "args": args, "code": code})
        for name, (args, code) in nets.items()
    }
    assert [group.changed for group in group_runs([runs["one"], runs["two"]])] == [
        {"model.target": "a.py:A", "model.args.width": None},
        {"model.target": "b.py:B", "model.args.width": 8},
    ]
    assert [group.changed for group in group_runs([runs["two"], runs["three"]])] == [
        {"model.code": "2233"},
        {"model.code": "4455"},
    ]
