"""`checkpoint.every: auto`: the formula against what Daly published, what counts as a loss, and what a run measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TINY, tiny_spec

from benchmarks.goodput import expected_goodput
from cifar_hpc.__main__ import main
from cifar_hpc.config.io import merge
from cifar_hpc.config.spec import CheckpointSpec
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.history import History, Losses
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.checkpoints import interval
from cifar_hpc.training.checkpoints.interval import (
    CheckpointPacer,
    Costs,
    best_interval,
    daly,
    mean_time_to_loss,
)
from cifar_hpc.training.checkpoints.store import newest_good

DAY = 86_400.0


@pytest.mark.parametrize(("mean", "published"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_daly_s_own_predictions(mean: float, published: float) -> None:
    """Daly 2006, figures 3 to 5: a checkpoint of 5 minutes; all in minutes."""
    assert daly(5, mean) == pytest.approx(published, rel=0.006)


@pytest.mark.parametrize("cost", [0.01, 0.5, 5.0, 60.0])
@pytest.mark.parametrize("mean", [120.0, 3600.0, DAY])
@pytest.mark.parametrize("restart", [0.0, 136.0])
def test_no_other_interval_loses_noticeably_less(cost: float, mean: float, restart: float) -> None:
    def goodput(seconds: float) -> float:
        return expected_goodput(seconds, Costs(cost, 0), restart, mean)

    ours = goodput(daly(cost, mean) + cost)
    best = max(goodput(cost * 1.01 + mean * 10 ** (-5 + 6 * i / 2000)) for i in range(2000))
    assert ours == pytest.approx(best, rel=2e-4)
    assert 0 < ours < 1


def test_a_checkpoint_dearer_than_the_time_between_losses() -> None:
    assert daly(100, 10) == 10


@pytest.mark.parametrize(
    ("costs", "mean", "expected"),
    [
        (Costs(0.5, 1.4), DAY, pytest.approx(294, rel=0.01)),
        (Costs(0.002, 0.02), DAY, pytest.approx(18.6, rel=0.01)),
        (Costs(0.002, 0.02), 60, interval.LEAST_SECONDS),
        (Costs(60, 60), DAY, interval.MOST_SECONDS),
        (Costs(0.5, 30), 60, 300),  # ten times as long as a write takes
        (Costs(0.5, 600), 60, 6000),  # and that even beyond the longest interval
    ],
)
def test_bounds(costs: Costs, mean: float, expected: Any) -> None:
    assert best_interval(costs, mean) == expected


def test_what_is_believed_of_losses() -> None:
    assert mean_time_to_loss(Losses()) == DAY
    assert mean_time_to_loss(Losses(0, 40 * DAY)) == DAY, "a quiet time is no proof"
    assert mean_time_to_loss(Losses(1, 300)) < 2 * 3600, "one early loss counts for much"
    assert mean_time_to_loss(Losses(100, 100 * 300)) == pytest.approx(300, rel=0.13)
    means = [mean_time_to_loss(Losses(n, 7200)) for n in range(20)]
    assert means == sorted(means, reverse=True)


def row(event: str, seconds: int, restart: int | None, **details: Any) -> dict[str, Any]:
    return {
        "event": event,
        "time": f"2026-11-23T10:{seconds // 60:02}:{seconds % 60:02}.000Z",
        "restart": restart,
    } | details


START = row("started", 0, 0, step=0)
SAVED = row("checkpoint", 90, 0, step=9)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], Losses()),
        ([START], Losses()),  # this start
        ([START, SAVED, row("resumed", 600, 1, step=9)], Losses(1, 90)),  # killed, no one knows when
        ([START, row("resumed", 600, 1, step=0)], Losses(1, 0)),
        ([START, SAVED, row("failed", 100, 0, step=11), row("resumed", 600, 1, step=9)], Losses(1, 100)),
        ([START, SAVED, row("signal", 90, 0, step=9), row("resumed", 600, 1, step=9)], Losses(0, 90)),
        ([START, row("finished", 99, 0, step=18), row("resumed", 600, 1, step=18)], Losses(0, 99)),  # more epochs
        # A stop that was announced, but whose checkpoint could not be written.
        ([START, SAVED, row("signal", 95, 0, step=11), row("resumed", 600, 1, step=9)], Losses(1, 95)),
        # Told to stop before anything was computed.
        ([START, row("signal", 5, 0), row("started", 600, 1, step=0)], Losses(0, 5)),
        # What others write between two starts is no time of running.
        ([START, SAVED, row("submitted", 500, None), row("resumed", 600, 1, step=9)], Losses(1, 90)),
        ([START, SAVED, row("resumed", 200, 1, step=9), row("resumed", 300, 2, step=9)], Losses(2, 90)),
        ([{"event": "started"}, {"event": "resumed", "time": 5, "step": "x"}, {}], Losses(1, 0)),
    ],
    ids=[
        "new", "first", "killed", "killed early", "crashed", "preempted", "finished", "not saved", "stopped early",
        "submitted", "killed twice", "foreign",
    ],
)  # fmt: skip
def test_only_unannounced_ends_lose_work(rows: list[dict[str, Any]], expected: Losses) -> None:
    assert History.of(rows).losses == expected


def pace(past: Losses | None = None) -> tuple[CheckpointPacer, list[str]]:
    lines: list[str] = []
    return CheckpointPacer(past or Losses(), lines.append, 0), lines


def test_what_a_checkpoint_costs_is_measured() -> None:
    measured, _ = pace()
    now = 0.0
    for seconds in (9.0, 9.0, 9.0, *[0.1] * 20):  # the first ones warm up
        now += seconds
        measured.step(seconds, False, now)
    assert measured.costs == Costs()
    now += 0.3
    measured.saved(0.3, now)
    for seconds, writing in ((0.2, True), (0.2, True), (0.15, False), (0.1, False)):
        now += seconds
        measured.step(seconds, writing, now)
    # The snapshot, and 0.25 s that three steps took longer than 0.1 s; on disk 0.85 s after the snapshot began.
    assert measured.costs == Costs(pytest.approx((1 + 0.55) / 2), pytest.approx(0.85))
    for _ in range(interval.CHECKPOINTS_KEPT):
        measured.saved(0.3, now)
        now += 0.5
        measured.step(0.5, False, now)
    assert measured.costs == Costs(pytest.approx(0.7), pytest.approx(0.8)), "nothing is left of the prior"


def test_the_interval_of_epoch_ends_is_by_measured_costs_alone() -> None:
    measured, _ = pace()
    for _ in range(5):
        measured.step(0.5, False, 0)
    assert measured.epoch_interval(0) == interval.LEAST_SECONDS, "nothing is measured yet"
    measured.saved(0.02, 0.02)
    measured.step(0.5, True, 0.5)
    assert measured.epoch_interval(5) == 50, "ten times what the write has taken so far"
    measured.step(0.5, False, 1.0)
    assert measured.costs.stall == pytest.approx((1 + 0.02) / 2), "with the prior"
    assert measured.epoch_interval(1) == pytest.approx(best_interval(Costs(0.02, 1.0), DAY))
    assert measured.epoch_interval(1) < measured.interval(1) / 4
    for _ in range(interval.CHECKPOINTS_KEPT):
        measured.saved(0.02, 1)
        measured.step(0.5, False, 1)
    assert measured.epoch_interval(1) == measured.interval(1), "nothing is left of the prior"


def test_a_checkpoint_that_waits_for_the_one_before_it() -> None:
    measured, _ = pace()
    for _ in range(10):
        measured.step(1.0, False, 0)
    measured.saved(0.2, 0.2)
    measured.step(1.0, True, 1.2)
    measured.saved(0.4, 1.6)
    measured.step(1.0, False, 2.6)
    assert measured.costs == Costs(pytest.approx((1 + 0.3) / 2), pytest.approx(2.6)), (
        "two snapshots, and the last is on disk late"
    )


def test_steps_that_happen_to_be_quick_beside_a_write_do_not_make_it_free() -> None:
    measured, _ = pace()
    for _ in range(10):
        measured.step(1.0, False, 0)
    for _ in range(interval.CHECKPOINTS_KEPT):
        measured.saved(0.07, 0)
        measured.step(0.5, False, 0.5)
    assert measured.costs.stall == pytest.approx(0.07)
    free, _ = pace()
    for _ in range(interval.CHECKPOINTS_KEPT):
        free.saved(0.0, 0)
        free.step(0.0, False, 0.0)
    assert free.interval(1.0) == interval.LEAST_SECONDS


def test_a_suspension_during_a_write_is_not_the_cost_of_a_checkpoint() -> None:
    measured, _ = pace()
    for seconds in (0.5, 7200.0, 0.5):
        measured.saved(0.1, 0)
        measured.step(seconds, False, seconds)
    assert measured.costs.write == pytest.approx(0.6), "with its snapshot"
    assert measured.interval(8000) < interval.MOST_SECONDS


def test_the_log_tells_the_interval_once_and_when_it_changes_noticeably() -> None:
    measured, lines = pace()
    assert [measured.interval(now) for now in (0.0, 1.0, 60.0)] == [pytest.approx(417, rel=0.01)] * 3
    assert len(lines) == 1
    assert "every 6m56s" in lines[0]
    assert lines[0].endswith("6m56s: one costs ~1 s, no work was lost")
    measured.saved(0.9, 100)
    measured.step(0.1, False, 101)
    assert measured.interval(101) < 417
    assert len(lines) == 1, "nearly the same"
    for now in range(110, 200, 10):
        measured.saved(0.05, now)
        measured.step(0.1, False, now + 1)
        measured.interval(now)
    assert measured.interval(200) < 200
    assert 2 <= len(lines) <= 4
    assert ": one costs 0." in lines[1]


def test_losses_shorten_the_interval() -> None:
    quiet, _ = pace()
    harsh, lines = pace(Losses(12, 3600))
    assert harsh.interval(0) < quiet.interval(0) / 4
    assert lines[0].endswith(", work was lost 12 times")


@pytest.mark.parametrize(
    ("sections", "automatic", "seconds"),
    [
        ({}, True, None),
        ({"every": None}, True, None),
        ({"every": "auto"}, True, None),
        ({"every_minutes": 2.5}, False, 150),
        ({"every_steps": 7}, False, None),
        ({"every": "auto", "every_minutes": None}, True, None),
    ],
)
def test_keys(sections: dict[str, Any], automatic: bool, seconds: float | None) -> None:
    checkpoint: CheckpointSpec = tiny_spec(checkpoint=sections).checkpoint
    assert (checkpoint.automatic, checkpoint.interval_seconds) == (automatic, seconds)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"every": "auto", "every_steps": 5}, r"every: auto and checkpoint\.every_steps: 5 .* checkpoint\.every=null"),
        ({"every": "auto", "every_minutes": 0.5}, r"every: auto and checkpoint\.every_minutes: 0\.5"),
        ({"every_minutes": 1, "every_steps": 5}, r"every_minutes: 1 and .* checkpoint\.every_minutes=null"),
        ({"every": "sometimes"}, r"checkpoint\.every: 'sometimes' is not allowed; allowed: auto, or null"),
        ({"every": True}, r"checkpoint\.every: True"),
        ({"every": 5}, r"checkpoint\.every: 5"),
    ],
)
def test_keys_that_contradict_each_other(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tiny_spec(checkpoint=sections)


def test_a_run_saves_at_its_own_pace_and_keeps_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with a checkpoint after every step that the bounds allow, one without any but at the epochs' ends."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(merge(TINY, {"checkpoint": {"every": "auto", "keep": 99}})))
    events = tmp_path / "logs" / "often" / "events.jsonl"
    events.parent.mkdir(parents=True)
    killed = [row("started", 0, 0, step=0), *(row("resumed", n, n, step=0) for n in range(1, 50))]
    events.write_text("".join(json.dumps(event) + "\n" for event in killed))
    saved = {}
    for name, seconds in (("rarely", 3600.0), ("often", 1e-6)):
        monkeypatch.setattr(interval, "LEAST_SECONDS", seconds)
        monkeypatch.setattr(interval, "MOST_SECONDS", seconds)
        monkeypatch.setattr(interval, "WRITES_APART", 0.0)
        assert main(["train", str(job), "--name", name]) == 0
        saved[name] = sorted(p.name for p in (tmp_path / "checkpoints" / name).glob("step_*.pt"))
    assert saved["rarely"] == ["step_00000009.pt", "step_00000018.pt"]
    assert {"step_00000001.pt", *saved["rarely"]} <= set(saved["often"])
    found = [newest_good(tmp_path / "checkpoints" / name) for name in ("rarely", "often")]
    rarely, often = (f.state for f in found if f is not None)
    for key in ("model", "optimizer", "buffers", "slow_buffers", "sums"):
        assert digest(getattr(rarely, key)) == digest(getattr(often, key)), key
    log = (tmp_path / "logs" / "often" / "train.log").read_text()
    assert "one costs ~1 s, work was lost 50 times" in log
