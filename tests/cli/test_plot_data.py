"""The curves that figures show, and what they make of seeds and of damage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_logs import Maker, make_run, metrics_row, series_of

from cifar_hpc.cli.figures.curves import Score, read_curves, steep_part_left_out


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def test_a_run_is_its_rows(make: Maker) -> None:
    (one,) = series_of(make("a", [10, 20, 15]))
    line = one.line("test_accuracy")
    assert line.mean == {1: 10, 2: 20, 3: 15}
    assert (line.low, line.high, line.beyond, line.restarts) == ({}, {}, (), ())
    assert one.score() == Score(epoch=3, last=15, last_deviation=None, best=20, best_epoch=2)


def test_seeds_are_a_mean_within_the_least_and_the_greatest(make: Maker) -> None:
    (one,) = series_of(make("a", [10, 20], train={"seed": 0}), make("b", [14, 30], train={"seed": 1}))
    line = one.line("test_accuracy")
    assert line.mean == {1: 12, 2: 25}
    assert line.low == pytest.approx({1: 12 - math.sqrt(8), 2: 25 - math.sqrt(50)})
    assert line.high == pytest.approx({1: 12 + math.sqrt(8), 2: 25 + math.sqrt(50)})
    score = one.score()
    assert score is not None
    assert (score.last, score.best, score.best_epoch) == (25, 25, None)
    assert score.last_deviation == pytest.approx(math.sqrt(50))


def test_the_mean_ends_where_the_first_seed_does_and_the_others_go_on_alone(make: Maker) -> None:
    (one,) = series_of(
        make("a", [10, 20, 40, 50], restarts=(4,), train={"seed": 0}),
        make("b", [14, 30], restarts=(2,), train={"seed": 1}),
    )
    line = one.line("test_accuracy")
    assert line.mean == {1: 12, 2: 25}
    assert line.beyond == ({2: 20, 3: 40, 4: 50},)
    assert line.restarts == ((4, 50), (2, 25))
    score = one.score()
    assert score is not None
    assert score.epoch == 2


def test_a_seed_without_any_epoch_takes_nothing_from_the_others(make: Maker) -> None:
    (one,) = series_of(make("a", [10, 20], train={"seed": 0}), make("b", [], train={"seed": 1}))
    assert one.line("test_accuracy").mean == {1: 10, 2: 20}
    assert one.line("test_accuracy").low == {}
    assert len(one.members) == 1


def test_groups_without_epochs_are_no_series(make: Maker) -> None:
    assert series_of(make("a", [])) == []


def test_restarts_are_where_the_number_grows(make: Maker) -> None:
    assert read_curves(make("a", [1, 2, 3, 4, 5], restarts=(1, 3, 3))).restarts == (1, 3)


def test_labels_say_what_differs(make: Maker) -> None:
    series = series_of(make("a", [1], model={"dropout": 0.5}), make("b", [1], model={"dropout": 0.0}))
    assert [one.label for one in series] == ["dropout 0", "dropout 0.5"]


def test_damage_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    rows: list[dict[str, Any]] = [
        {**metrics_row(1, 10), "test_accuracy": "much", "train_accuracy": True},
        {**metrics_row(2, 20), "test_accuracy": float("nan"), "test_loss": 1e308, "lr": -1},
        {**metrics_row(3, 30), "test_accuracy": 101.0, "restart": "x"},
        {**metrics_row(4, 40), "epoch": "4"},
        {**metrics_row(5, 50), "epoch": 10**400},
        {**metrics_row(6, 60), "epoch": True},
        metrics_row(7, 70),
        metrics_row(7, 71),
        {"epoch": 8},
    ]
    lines = [*map(json.dumps, rows), "[1]", "\0\0", json.dumps(metrics_row(9, 90))[:40]]
    run.metrics.write_text("\n".join(lines))
    curves = read_curves(run).curves
    assert curves["test_accuracy"] == {7: 71}
    assert curves["train_accuracy"] == {2: 21, 3: 31, 7: 72}
    assert set(curves["test_loss"]) == {1, 3, 7}
    assert set(curves["lr"]) == {1, 3, 7}


def test_a_field_that_no_row_has_is_an_empty_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    run.metrics.write_text(json.dumps({"epoch": 1, "lr": 0.1}) + "\n")
    (one,) = series_of(run)
    assert one.line("test_accuracy").mean == {}
    assert one.score() is None


def test_a_run_whose_spec_is_damaged_still_has_its_curves(make: Maker) -> None:
    run = make("a", [10])
    run.spec.write_text("[")
    (one,) = series_of(run)
    assert (one.label, one.line("test_accuracy").mean) == ("a", {1: 10})


def test_long_runs_are_shown_without_their_steep_part() -> None:
    long = {epoch: float(epoch) for epoch in range(1, 101)}
    assert steep_part_left_out([long, {1: 0.0, 50: 99.5}]) == (6.0, 100.0)
    assert steep_part_left_out([{1: 5.0, 2: 6.0}]) is None
    assert steep_part_left_out([]) is None
