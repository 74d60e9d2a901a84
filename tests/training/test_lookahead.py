"""Lookahead: the paper's update by hand, its state, and life among schedulers, GradScaler and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from cifar_hpc.training.optim import Lookahead

INNER = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(3, 4), (5,)]]


def gradients(step: int, weights: Iterable[Tensor]) -> None:
    """Gradients that depend on the weights and on the step."""
    for number, weight in enumerate(weights):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))
        weight.grad = weight.detach() * 0.3 + noise


def train(optimizer: Optimizer, weights: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        gradients(step, weights)
        optimizer.step()


def bits(*trees: Iterable[Tensor]) -> list[bytes]:
    return [t.detach().numpy().tobytes() for tree in trees for t in tree]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (2, 0.8), (5, 0.5), (3, 1.0)])
def test_update_by_hand_over_three_syncs(inner: str, k: int, alpha: float) -> None:
    weights, expected = parameters(), parameters()
    look, plain = Lookahead(SGD(weights, **INNER[inner]), k, alpha), SGD(expected, **INNER[inner])
    slow = [w.detach().clone() for w in expected]
    for step in range(3 * k + 1):
        train(look, weights, step, step + 1)
        train(plain, expected, step, step + 1)
        if (step + 1) % k == 0:
            with torch.no_grad():
                slow = [s + alpha * (w - s) for s, w in zip(slow, expected, strict=True)]
                for w, s in zip(expected, slow, strict=True):
                    w.copy_(s)  # the momentum stays as it is
        for ours, theirs in zip([*weights, *look.slow], [*expected, *slow], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, check_stride=True)
    assert look.counter == 3 * k + 1


def test_slow_weights_start_as_a_copy() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, lr=0.1))
    assert bits(look.slow) == bits(weights)
    train(look, weights, 0, 1)
    assert bits(look.slow) == bits(parameters()) != bits(weights)


@pytest.mark.parametrize(("k", "alpha"), [(0, 0.5), (5, 0.0), (5, 1.5), (5, float("nan"))])
def test_impossible_settings(k: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Lookahead(SGD(parameters(), lr=0.1), k, alpha)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("stop", [0, 3, 5, 7])
def test_resume_through_a_file_is_bit_exact(tmp_path: Path, inner: str, stop: int) -> None:
    weights = parameters()
    whole = Lookahead(SGD(weights, **INNER[inner]), k=5)
    train(whole, weights, 0, 12)

    before = parameters()
    first = Lookahead(SGD(before, **INNER[inner]), k=5)
    train(first, before, 0, stop)
    torch.save({"weights": before, "optimizer": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    after = [w.detach().clone().requires_grad_() for w in saved["weights"]]
    second = Lookahead(SGD(after, lr=9.0), k=2, alpha=0.9)  # all of it comes from the file
    second.load_state_dict(saved["optimizer"])
    train(second, after, stop, 12)
    assert bits(after, second.slow) == bits(weights, whole.slow)
    assert (second.counter, second.k, second.alpha) == (12, 5, 0.5)


def test_loading_copies() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, **INNER["momentum"]))
    train(look, weights, 0, 1)
    state = look.state_dict()
    momenta = [entry["momentum_buffer"] for entry in state["inner"]["state"].values()]
    kept = bits(state["slow"], momenta)
    theirs = parameters()
    other = Lookahead(SGD(theirs, **INNER["momentum"]), k=1)
    other.load_state_dict(state)
    train(other, theirs, 1, 3)
    assert bits(state["slow"], momenta) == kept


@pytest.mark.parametrize("change", [lambda s: s[:1], lambda s: [s[0], s[1][:2]]])
def test_loading_what_does_not_fit_changes_nothing(change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, **INNER["momentum"]))
    state = look.state_dict()
    train(look, weights, 0, 3)
    kept = bits(weights, look.slow)
    with pytest.raises(ValueError, match="do not fit"):
        look.load_state_dict({**state, "slow": change(state["slow"])})
    assert bits(weights, look.slow) == kept
    assert look.counter == 3


def test_context_restores_the_bits_even_after_an_error() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, lr=0.1))
    train(look, weights, 0, 3)
    fast, slow = bits(weights), bits(look.slow)
    assert fast != slow
    with look.slow_weights():
        assert bits(weights) == slow
    assert bits(weights) == fast

    def spoil() -> None:
        with look.slow_weights():
            weights[0].data.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert bits(weights) == fast
    assert bits(look.slow) == slow


def test_closure_runs_with_gradients_and_returns_its_loss() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, lr=0.1), k=1)

    def closure() -> float:
        look.zero_grad()
        loss = sum((w**2).sum() for w in weights)
        loss.backward()
        return float(loss.detach())

    first, second = look.step(closure), look.step(closure)
    assert first is not None
    assert second is not None
    assert second < first


def test_zero_grad() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, lr=0.1))
    gradients(0, weights)
    look.zero_grad()
    assert all(w.grad is None for w in weights)


# ------------------------------------------------------------------ schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=12),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda n: 0.8**n),
}
ORDERS = {
    "scheduler made first": ("make", "load optimizer", "load scheduler"),
    "its state loaded first": ("make", "load scheduler", "load optimizer"),
    "optimizer loaded first": ("load optimizer", "make", "load scheduler"),
}


def scheduled(make: Callable[[], Optimizer], scheduler: str, order: tuple[str, ...] | None) -> tuple[list[float], Any]:
    """Rates of 12 steps, with a fresh start from saved states after 5 of them if `order` is given."""
    optimizer = make()
    weights = [p for g in optimizer.param_groups for p in g["params"]]
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for step in range(12):
        if step == 5 and order:
            saved, saved_schedule = optimizer.state_dict(), schedule.state_dict()
            kept = [w.detach().clone() for w in weights]
            optimizer = make()
            weights = [p for g in optimizer.param_groups for p in g["params"]]
            for w, k in zip(weights, kept, strict=True):
                w.data.copy_(k)
            for action in order:
                if action == "make":
                    schedule = SCHEDULERS[scheduler](optimizer)
                elif action == "load optimizer":
                    optimizer.load_state_dict(saved)
                else:
                    schedule.load_state_dict(saved_schedule)
        rates.append(optimizer.param_groups[0]["lr"])
        train(optimizer, weights, step, step + 1)
        schedule.step()
    return rates, bits(weights)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("order", ORDERS)
def test_schedulers_act_as_on_the_inner_optimizer(scheduler: str, order: str) -> None:
    plain = scheduled(lambda: SGD(parameters(), **INNER["momentum"]), scheduler, ORDERS[order])
    looked = scheduled(lambda: Lookahead(SGD(parameters(), **INNER["momentum"])), scheduler, ORDERS[order])
    whole = scheduled(lambda: Lookahead(SGD(parameters(), **INNER["momentum"])), scheduler, None)
    assert looked[0] == plain[0]  # LambdaLR made on a loaded optimizer starts over for one step: PyTorch's own way
    assert len(set(looked[0])) > 5
    if ORDERS[order][0] == "make":
        assert looked == whole


# ------------------------------------------------------------------ GradScaler


def test_an_overflow_neither_counts_nor_moves() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, **INNER["momentum"]), k=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    for step in range(5):
        look.zero_grad()
        loss = sum((w * w).sum() for w in weights)
        fast, slow = bits(weights), bits(look.slow)
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(look)
        scaler.update()
        if step == 1:
            assert (bits(weights), bits(look.slow), look.counter) == (fast, slow, 1)
            assert scaler.get_scale() == 4.0
        else:
            assert bits(weights) != fast
    assert look.counter == 4

    reference = parameters()
    plain = Lookahead(SGD(reference, **INNER["momentum"]), k=2)
    for _ in range(4):
        plain.zero_grad()
        sum((w * w).sum() for w in reference).backward()  # type: ignore[union-attr]
        plain.step()
    assert bits(weights, look.slow) == bits(reference, plain.slow)  # scales are powers of two: the same bits


# ------------------------------------------------------------------ parameter groups


def test_an_added_group_is_trained_synced_and_saved() -> None:
    first, second = parameters()
    look = Lookahead(SGD([first], **INNER["momentum"]), k=3)
    train(look, [first], 0, 3)
    look.add_param_group({"params": [second], "lr": 0.01})
    assert bits(look.slow[1:]) == bits([second])
    assert look.param_groups is look.inner.param_groups
    train(look, [first, second], 3, 6)
    assert bits(look.slow) == bits([first, second])  # a sync has just been
    assert look.param_groups[1]["lr"] == 0.01

    copies = [w.detach().clone().requires_grad_() for w in (first, second)]
    other = Lookahead(SGD([copies[0]], lr=1.0))
    other.add_param_group({"params": [copies[1]]})
    other.load_state_dict(look.state_dict())
    train(look, [first, second], 6, 10)
    train(other, copies, 6, 10)
    assert bits(copies, other.slow) == bits([first, second], look.slow)


def test_a_parameter_cannot_be_added_twice() -> None:
    weights = parameters()
    look = Lookahead(SGD(weights, lr=0.1))
    with pytest.raises(ValueError, match="more than one parameter group"):
        look.add_param_group({"params": [weights[0]]})
    assert len(look.slow) == len(weights)
