"""Sweeps as text: which runs a section `sweep` stands for, and what it may not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT

from cifar_hpc.config.io import load_spec, load_values, merge, run_name
from cifar_hpc.config.sweep import expand
from cifar_hpc.config.yaml_loader import parse_yaml
from cifar_hpc.errors import SpecError

JOBS = PROJECT / "jobs"
BASE = {"data": {"source": "synthetic"}, "train": {"epochs": 3}}


def values_of(text: str, **more: Any) -> list[dict[str, Any]]:
    """What the points of a section change."""
    return [point.values for point in expand("job", parse_yaml(text, "text"), merge(BASE, more))[0]]


def test_grid_zip_list_and_seeds_are_multiplied_and_seeds_change_fastest() -> None:
    text = """
seeds: [3, 5]
grid: {model.dropout: [0.1, 0.2], model.activation: [relu]}
zip: {model.blocks: [[1], [1, 2]], model.widths: [[8], [8, 16]]}
list: [{optimizer.lr: 0.1}, {optimizer.lr: 0.2, optimizer.nesterov: true}]
"""
    found = values_of(text)
    assert len(found) == 2 * 2 * 2 * 2
    assert found[0] == {
        "model.dropout": 0.1, "model.activation": "relu", "model.blocks": [1], "model.widths": [8],
        "optimizer.lr": 0.1, "train.seed": 3,
    }  # fmt: skip
    assert [v["train.seed"] for v in found[:4]] == [3, 5, 3, 5]
    assert {(len(v["model.blocks"]), len(v["model.widths"])) for v in found} == {(1, 1), (2, 2)}
    assert {(v["optimizer.lr"], v.get("optimizer.nesterov")) for v in found} == {(0.1, None), (0.2, True)}


def test_a_point_is_written_as_set_takes_it() -> None:
    section = {"list": [{"optimizer.nesterov": True, "resizing.initial": None, "model.blocks": [1, 2, 3]}]}
    (point,) = expand("job", section, {})[0]
    assert str(point) == "optimizer.nesterov=true resizing.initial=null model.blocks=[1, 2, 3]"


def test_a_number_of_seeds_counts_from_zero() -> None:
    assert values_of("seeds: 3") == [{"train.seed": 0}, {"train.seed": 1}, {"train.seed": 2}]


def test_a_point_is_named_and_specified_as_if_it_were_submitted_alone(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("train: {epochs: 7}\nsweep: {grid: {model.dropout: [0.1, 0.3]}, seeds: 2, parallel: 4}\n")
    values = load_values(job)
    points, parallel = expand(job.stem, values.pop("sweep"), values)
    alone = load_spec(job, ["sweep=null", "model.dropout=0.3", "train.seed=1"])
    last = points[-1]
    assert last.spec == alone and last.run == run_name("job", alone) and str(last) == "model.dropout=0.3 train.seed=1"
    assert parallel == 4 and len({point.run for point in points}) == 4


def test_a_point_that_stands_there_twice_is_one_run() -> None:
    # 0.2 is dropout's default: the same point as without it.
    assert values_of(
        "{list: [{model.dropout: 0.2}, {model.dropout: 0.1}, {train.seed: 0}, {model.dropout: 1e-1}]}"
    ) == [
        {"model.dropout": 0.2},
        {"model.dropout": 0.1},
    ]


def test_set_reaches_into_the_sweep(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("sweep: {grid: {model.dropout: [0.1, 0.3]}, seeds: 2}\n")
    values = load_values(job, ["sweep.grid.model.dropout=[0.5]", "sweep.parallel=2", "sweep.seeds=[9]"])
    points, parallel = expand("job", values.pop("sweep"), values)
    assert [point.values for point in points] == [{"model.dropout": 0.5, "train.seed": 9}]
    assert parallel == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", ["sweep: 3", "a mapping of grid, zip, list, seeds"]),
        ("{gird: {}}", ["sweep.gird: unknown key", "did you mean 'grid'"]),
        ("{}", ["sweep: has 0 points", "1 to"]),
        ("{parallel: 2}", ["sweep: has 0 points"]),
        ("{seeds: 2, parallel: 0}", ["sweep.parallel: 0", "an integer >= 1 and <= 10000"]),
        ("{seeds: 2, parallel: 10001}", ["sweep.parallel: 10001", "an integer >= 1 and <= 10000"]),
        ("{seeds: 0}", ["sweep.seeds: 0"]),
        ("{seeds: true}", ["sweep.seeds: True"]),
        ("{seeds: []}", ["sweep.seeds: []"]),
        ("{seeds: many}", ["sweep.seeds: 'many'"]),
        ("{seeds: 1000000000}", ["sweep.seeds: 1000000000"]),
        ("{seeds: 1000, grid: {optimizer.lr: [1, 2, 3], model.dropout: 5}}", ["sweep.grid.model.dropout: 5"]),
        ("{seeds: 5000, grid: {optimizer.lr: [1, 2, 3]}}", ["sweep: has 15,000 points", "1 to 10,000"]),
        ("{grid: [1]}", ["sweep.grid: [1]", "a mapping of keys to lists"]),
        ("{grid: {model.dropout: []}}", ["sweep.grid.model.dropout: []"]),
        ("{grid: {1: [2]}}", ["the point 1=2: 1: unknown key"]),
        ("{zip: {model.dropout: [0, 0.1], optimizer.lr: [1]}}", ["sweep.zip: model.dropout has 2, optimizer.lr has 1"]),
        ("{list: [3]}", ["sweep.list: [3]"]),
        ("{list: {model.dropout: 0}}", ["sweep.list: {"]),
        ("{grid: {model.dropuot: [0]}}", ["the point model.dropuot=0", "model.dropuot: unknown key", "'dropout'"]),
        ("{grid: {model.dropout: [0, 2]}}", ["the point model.dropout=2", "model.dropout: 2 is not allowed"]),
        ("{grid: {resources.time: [1, 2]}}", ["resources.time is not allowed", "share one job array"]),
        ("{list: [{train.device: cpu}]}", ["train.device is not allowed"]),
        ("{grid: {resources: [{}]}}", ["resources is not allowed"]),
        ("{grid: {train.seed: [1]}, seeds: 2}", ["train.seed and train.seed are varied twice"]),
        ("{grid: {model: [{dropout: 0}]}, list: [{model.dropout: 0}]}", ["model and model.dropout are varied twice"]),
        ("{grid: {train.epochs: [1], train: {epochs: [3]}}}", ["sweep.grid: train.epochs is given twice, dotted and"]),
        ("{grid: {train: {epochs: [3]}, train.epochs: [1]}}", ["sweep.grid: train.epochs is given twice"]),
        ("{zip: {train.epochs: [1], train: {epochs: [3]}}}", ["sweep.zip: train.epochs is given twice"]),
        ("{list: [{train.seed: 0}, {train.epochs: 1, train: {epochs: 3}}]}", ["sweep.list: train.epochs is given"]),
        ("{zip: {model: [{dropout: 0}], model.dropout: [0.1]}}", ["sweep.zip: model and model.dropout say the same"]),
        ("{list: [{train.epochs: 1, train: null}]}", ["sweep.list: train and train.epochs say the same twice"]),
        ("{grid: {train: {1: [2]}}}", ["the point train.1=2: train.1: unknown key"]),
        ("{grid: {checkpoint.keep: [1, 2]}}", ["checkpoint.keep=1 and checkpoint.keep=2 are the same run"]),
    ],
)  # fmt: skip
def test_what_makes_no_sweep_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        values_of(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("spelling", ["{model.dropout: [0.1, 0.3]}", "{model: {dropout: [0.1, 0.3]}}"])
@pytest.mark.parametrize("part", ["grid", "zip"])
def test_set_reaches_a_key_however_it_is_spelt(tmp_path: Path, spelling: str, part: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"sweep: {{{part}: {spelling}}}\n")
    for override in (f"sweep.{part}.model.dropout=[0.5]", f"sweep.{part}={{model: {{dropout: [0.5]}}}}"):
        values = load_values(job, [override])
        (point,) = expand(job.stem, values.pop("sweep"), values)[0]
        assert point.values == {"model.dropout": 0.5}


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("sweep: {grid: {train.epochs: [1, 2], train: {epochs: [3]}}}", []),
        ("sweep: {seeds: 2}", ["sweep.grid={train.epochs: [1, 2], train: {epochs: [3]}}"]),
        ("sweep: {seeds: 2}", ["sweep={grid: {train: {epochs: [3]}, train.epochs: [1]}}"]),
    ],
)
def test_a_key_that_is_given_twice_is_named(tmp_path: Path, text: str, overrides: list[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(
        SpecError, match=r"^sweep\.grid: train\.epochs is given twice, dotted and nested; allowed: once"
    ):
        load_values(job, overrides)


@pytest.mark.parametrize("text", ["train: {epochs: 1}\ntrain.epochs: 2", "train.epochs: 2"])
def test_a_job_file_has_no_dotted_keys(tmp_path: Path, text: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(SpecError, match=r"^train\.epochs: unknown key"):
        load_spec(job)


def test_a_command_for_one_run_names_the_sweep(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("sweep: {seeds: 2}\n")
    with pytest.raises(SpecError, match=r"sweep: .*job\.yaml describes many runs.*--set sweep=null"):
        load_spec(job)
    assert load_spec(job, ["sweep=null"]) == load_spec(JOBS / "improved_resnet.yaml")


@pytest.mark.parametrize("job", sorted((JOBS / "sweeps").glob("*.yaml")), ids=lambda job: job.stem)
def test_the_sweeps_of_the_project(job: Path) -> None:
    values = load_values(job)
    points, _ = expand(job.stem, values.pop("sweep"), values)
    seeds = {point.values["train.seed"] for point in points}
    assert len(seeds) == 3 and len(points) % 3 == 0 and len(points) >= 6
    # A recipe as it stands is among the points, so that each question is asked against it.
    base = load_spec(JOBS / ("improved_resnet_fast.yaml" if job.stem == "fast_elements" else "improved_resnet.yaml"))
    assert any(point.spec == base for point in points)
    assert f"python submit.py jobs/sweeps/{job.name}" in job.read_text()


def test_there_is_a_sweep_for_each_lesson_of_the_report() -> None:
    assert {job.stem for job in (JOBS / "sweeps").glob("*.yaml")} >= {"activation", "dropout", "stem_width", "schedule"}
