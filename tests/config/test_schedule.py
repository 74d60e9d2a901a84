"""The learning rate against PyTorch's own scheduler."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from cifar_hpc.config.schedule import learning_rate
from cifar_hpc.config.spec import ScheduleSpec, Spec

STEPS = 391


def spec(**schedule: Any) -> Spec:
    return dataclasses.replace(Spec(), schedule=ScheduleSpec(**schedule))


def torch_rates(base: float, periods: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = CosineAnnealingLR(optimizer, T_max=periods)
    rates = []
    for _ in range(periods + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_per_epoch_it_is_cosine_annealing_over_400_epochs() -> None:
    ours = [learning_rate(spec(), epoch, epoch * STEPS, STEPS) for epoch in range(401)]
    assert ours == pytest.approx(torch_rates(0.05, 400), abs=1e-9, rel=0)
    assert (ours[0], ours[400]) == (0.05, 0.0)
    assert ours[200] == pytest.approx(0.025)


def test_per_epoch_it_does_not_move_within_an_epoch() -> None:
    assert learning_rate(spec(), 7, 7 * STEPS, STEPS) == learning_rate(spec(), 7, 7 * STEPS + 200, STEPS)


def test_per_step_it_is_cosine_annealing_over_all_updates() -> None:
    short = dataclasses.replace(spec(per="step"), train=dataclasses.replace(Spec().train, epochs=3))
    ours = [learning_rate(short, update // 50, update, 50) for update in range(151)]
    assert ours == pytest.approx(torch_rates(0.05, 150), abs=1e-9, rel=0)


def test_per_step_a_skipped_update_does_not_advance_it() -> None:
    assert learning_rate(spec(per="step"), 0, 5, STEPS) == learning_rate(spec(per="step"), 3, 5, STEPS)


def test_a_linear_rate_is_torchs() -> None:
    short = dataclasses.replace(
        spec(name="linear", per="step", warmup_epochs=1), train=dataclasses.replace(Spec().train, epochs=4)
    )
    ours = [learning_rate(short, update // 50, update, 50) for update in range(201)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for update in range(50, 201):
        assert ours[update] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert (ours[50], ours[200]) == (0.05, 0.0)
    by_epoch = [learning_rate(spec(name="linear"), epoch, epoch * STEPS + 7, STEPS) for epoch in (0, 100, 400)]
    assert by_epoch == pytest.approx([0.05, 0.0375, 0.0])


def test_constant() -> None:
    assert {learning_rate(spec(name="constant"), e, e * STEPS, STEPS) for e in (0, 10, 399)} == {0.05}


def test_it_never_rises_again_beyond_the_end() -> None:
    assert math.isclose(learning_rate(spec(), 500, 500 * STEPS, STEPS), 0.0, abs_tol=1e-12)


def test_warm_up_rises_with_each_update_and_then_the_cosine_begins_at_the_top() -> None:
    short = dataclasses.replace(
        Spec(),
        schedule=ScheduleSpec(per="step", warmup_epochs=1.5),
        train=dataclasses.replace(Spec().train, epochs=4),
    )
    ours = [learning_rate(short, update // 50, update, 50) for update in range(201)]
    assert ours[:75] == pytest.approx([0.05 * (n + 1) / 76 for n in range(75)])
    assert ours[75:] == pytest.approx(torch_rates(0.05, 125), abs=1e-9, rel=0)
    assert ours[75] == 0.05 == max(ours)


def test_warm_up_of_a_rate_that_moves_by_epochs() -> None:
    short = dataclasses.replace(
        Spec(), schedule=ScheduleSpec(warmup_epochs=1), train=dataclasses.replace(Spec().train, epochs=5)
    )
    ours = [learning_rate(short, update // 10, update, 10) for update in range(50)]
    assert ours[:10] == pytest.approx([0.05 * (n + 1) / 11 for n in range(10)])
    assert ours[10::10] == pytest.approx(torch_rates(0.05, 4)[:4], abs=1e-9, rel=0)
    assert len(set(ours[10:20])) == 1


def test_warm_up_before_a_constant_rate() -> None:
    short = dataclasses.replace(Spec(), schedule=ScheduleSpec(name="constant", warmup_epochs=1))
    assert learning_rate(short, 0, 0, 10) < learning_rate(short, 0, 9, 10) < 0.05 == learning_rate(short, 1, 10, 10)
