"""The arithmetic of what checkpoints and the things around a step cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint import ASYNC_SAVE, NONE, OURS, TORCH_SAVE, Contest, lost_rows
from benchmarks.overhead import rows_of
from cifar_hpc.training.checkpoints.store import newest_good


def test_what_a_checkpoint_costs_is_what_its_block_took_longer() -> None:
    seconds = {NONE: [4.0, 5.0, 4.0], OURS: [4.1, 5.1, 4.1], TORCH_SAVE: [4.4, 5.4, 4.4]}
    each, minutely = lost_rows(seconds, TORCH_SAVE, 10, "")
    assert each.ours[1] == pytest.approx(2.5)
    assert each.theirs[1] == pytest.approx(10)
    assert minutely.ours[1] == pytest.approx(100 * 0.1 / 60, rel=1e-3)
    assert each.met and minutely.met


def test_a_cost_above_the_target_is_told() -> None:
    seconds = {NONE: [1.0, 1.0], OURS: [1.7, 1.7], TORCH_SAVE: [1.0, 1.0]}
    assert [row.met for row in lost_rows(seconds, TORCH_SAVE, 10, "")] == [False, False]
    assert lost_rows(seconds, TORCH_SAVE, 2, "")[0].met is None  # --quick has shorter blocks than the target


def test_what_is_around_a_step_is_added_up() -> None:
    parts = {"stop agreement": [0.01, 0.03, 0.02], "metrics": [0.01, 0.01, 0.01]}
    total, *each = rows_of(2, "< 3 %", [1.0, 2.0, 1.0], parts, "batch 128, bf16")
    assert list(total.ours) == [2.5, 3.0, 3.5]  # of a step of 1 s
    assert total.met is False
    assert [row.ours[1] for row in each] == [20.0, 10.0]


def test_all_ways_save_the_training_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.checkpoint.BATCH", 2)
    contest = Contest(tmp_path)
    for way in (OURS, TORCH_SAVE, ASYNC_SAVE):
        contest.block(way, 0)
    contest.settle()
    weights = dict(contest.trainer.engine.model.named_parameters())
    found = newest_good(contest.store.directory)
    assert found is not None
    saved = torch.load(contest.files[TORCH_SAVE], weights_only=True)
    assert all(torch.equal(found.state.model[name], weights[name]) for name in weights)
    assert all(torch.equal(saved["model"][name], weights[name]) for name in weights)
    assert min(contest.sizes().values()) > 2 * 4 * 4_903_082
    assert len(contest.durable[OURS]) == len(contest.durable[ASYNC_SAVE]) == 1
