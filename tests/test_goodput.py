"""The goodput simulation: by hand, against Daly's model, and what it says of `checkpoint.every: auto`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import goodput
from benchmarks.goodput import Setting, expected_goodput, killed, main, warned
from cifar_hpc.training.checkpoints import interval


class Lives(random.Random):
    """Draws the given lives, then endless ones."""

    def __new__(cls, *lives: float) -> Lives:
        return super().__new__(cls)

    def __init__(self, *lives: float) -> None:
        super().__init__(0)
        self._lives: Iterator[float] = iter(lives)

    def expovariate(self, lambd: float = 1.0) -> float:
        return next(self._lives, float("inf"))


BY_HAND = Setting(stall=1, write=3, restart=10, requeue=20, horizon=1000)


@pytest.mark.parametrize(
    ("lives", "useful"),
    [
        # 10 s of starting up, then a checkpoint at 110, 210, ... 910, each but the one after the last costing 1 s.
        ((), 990 - 9),
        # Killed at 350: the third checkpoint (at 310) holds 300 - 2 s. Then 20 + 10 s pass; 620 s with 6 checkpoints.
        ((350,), 298 + 620 - 6),
        # Killed at 312, while the third is being written: the second holds 199 s.
        ((312,), 199 + (1000 - 342) - 6),
        # Killed while starting up, and again before the first checkpoint: nothing of it counts.
        ((5, 100), (1000 - 25 - 120 - 10) - 8),
    ],
    ids=["never", "once", "while writing", "early"],
)
def test_by_hand(lives: tuple[float, ...], useful: float) -> None:
    assert killed(100, BY_HAND, 1, Lives(*lives)) == pytest.approx(useful / 1000)


def test_a_warned_run_loses_no_work() -> None:
    """Two preemptions: each start trains all of its life but 10 s, and saving takes 3 s more."""
    useful = (490 - 10) + (100 - 10) + (1000 - 490 - 23 - 100 - 23 - 10)
    assert warned(BY_HAND, 1, Lives(490, 100)) == pytest.approx(useful / 1000, abs=0.003)


@pytest.mark.parametrize("minutes", [2, 15, 120])
@pytest.mark.parametrize("seconds", [60, 300, 900])
def test_fixed_intervals_come_out_as_in_daly_s_model(minutes: float, seconds: float) -> None:
    setting, mean = Setting(horizon=4000 * 60 * minutes), 60 * minutes
    ours = fmean(killed(seconds, setting, mean, random.Random(seed)) for seed in range(4))
    assert ours == pytest.approx(expected_goodput(seconds, setting.costs, setting.restart, mean), abs=0.01)


def test_auto_is_nearly_as_good_as_knowing_the_rate() -> None:
    assert goodput.CheckpointPacer is interval.CheckpointPacer
    for requeue in (0.0, 121.0):
        curves = {name: [q[1] for q in points] for name, points in goodput.measure(Setting(requeue=requeue), 8).items()}
        for i, minutes in enumerate(goodput.MEANS):
            at = {name: points[i] for name, points in curves.items()}
            fixed_ones = [at[name] for name in ("1 min", "5 min", "15 min", "60 min", goodput.EPOCH)]
            assert at[goodput.AUTO] > at[goodput.BEST] - 0.01, minutes
            assert at[goodput.AUTO] > max(fixed_ones) - 0.01, minutes
            assert at[goodput.WARNED] > at[goodput.AUTO] - 0.01, minutes
        assert curves["60 min"][0] < 0.01 < 0.2 < curves[goodput.AUTO][0]


def test_auto_needs_the_losses_that_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the figure would look like if `auto` never learned: the test above can fail."""
    seeing = fmean(killed(None, Setting(), 120, random.Random(s)) for s in range(4))
    monkeypatch.setattr(interval, "mean_time_to_loss", lambda seen: interval.PRIOR_MEAN_SECONDS)
    blind = fmean(killed(None, Setting(), 120, random.Random(s)) for s in range(4))
    assert blind < seeing - 0.3


def test_the_script_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seeds", "2", "--hours", "2", "--requeue", "60", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "60 s from kill to start" in printed
    report = json.loads((tmp_path / "benchmarks" / "results" / "goodput.json").read_text())
    assert [panel["setting"]["requeue"] for panel in report["panels"]] == [0, 60]
    assert all(len(points) == len(goodput.MEANS) for panel in report["panels"] for points in panel["curves"].values())
    assert f"{100 * report['panels'][1]['curves'][goodput.AUTO][0][1]:.1f}%" in printed
    assert (tmp_path / "docs" / "goodput.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "docs" / "goodput.svg").read_text()
