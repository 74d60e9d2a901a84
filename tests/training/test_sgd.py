"""SGD without torch.compile's wrappers: the same bits, states and refusals as torch.optim.SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_hpc.config.spec import OptimizerSpec
from cifar_hpc.training.optim import SGD, build_inner

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(3, 4), (5,)]]


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[int]:
    """Six steps with a reload in the middle; what a hook after each step has counted."""
    counted: list[int] = []
    optimizer.register_step_post_hook(lambda *_: counted.append(1))
    for step in range(6):
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)
        loss = torch.stack([(p * p).sum() for p in parameters]).sum() * (step + 1)
        loss.backward()
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    return counted


def test_the_bits_of_torch() -> None:
    ours, theirs = weights(), weights()
    mine, reference = SGD(ours, **SETTINGS), torch.optim.SGD(theirs, **SETTINGS)
    assert train(mine, ours) == train(reference, theirs) == [1] * 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    state, other = mine.state_dict(), reference.state_dict()
    assert state["param_groups"] == other["param_groups"]
    for number in (0, 1):
        assert torch.equal(state["state"][number]["momentum_buffer"], other["state"][number]["momentum_buffer"])


def test_a_closure_is_called_with_gradients() -> None:
    parameters = weights()
    optimizer = SGD(parameters, lr=0.1)

    def closure() -> float:
        loss = (parameters[0] ** 2).sum()
        loss.backward()
        return float(loss.detach())

    before = parameters[0].detach().clone()
    assert optimizer.step(closure) == pytest.approx(float((before**2).sum()))
    assert torch.allclose(parameters[0], 0.8 * before)


def test_what_torch_refuses_is_refused() -> None:
    parameters = weights()
    optimizer = SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": parameters[:1]})
    with pytest.raises(ValueError, match="learning rate"):
        SGD(weights(), lr=-1.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_weight_decay_that_spares_norms_and_biases_is_torchs_with_two_groups(nesterov: bool) -> None:
    ours, theirs = (torch.nn.ParameterList(weights()) for _ in range(2))
    spec = OptimizerSpec(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=1e-2, decay_all=False)
    groups = [{"params": [theirs[0]]}, {"params": [theirs[1]], "weight_decay": 0.0}]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=1e-2)
    train(build_inner(ours, spec), list(ours))
    train(reference, list(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_by_default_everything_decays() -> None:
    ours, theirs = (torch.nn.ParameterList(weights()) for _ in range(2))
    train(build_inner(ours, OptimizerSpec(lr=0.1, weight_decay=1e-2)), list(ours))
    train(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=1e-2), list(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("factor", "same"), [(16.0, torch.equal), (3.0, torch.allclose)])  # 16 rounds nothing
@pytest.mark.parametrize("decay_all", [False, True])
def test_the_biases_rate_is_that_of_torchs_with_two_groups(factor: float, same: Any, decay_all: bool) -> None:
    """Their decay keeps the common rate."""
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
    ours, theirs = ([torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3), torch.nn.LayerNorm([2, 2])] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    decay, fast = 0.01 if decay_all else 0.0, {"lr": 0.01 * factor}
    groups = [
        {"params": [theirs[0].bias, theirs[1].bias], "weight_decay": decay / factor, **fast},
        {"params": [theirs[2].bias], "weight_decay": 0.01 / factor, **fast},  # two dimensions decay always
        {"params": [theirs[0].weight], "weight_decay": decay},
        {"params": [theirs[1].weight, theirs[2].weight], "weight_decay": 0.01},
    ]
    spec = OptimizerSpec(weight_decay=0.01, decay_all=decay_all, bias_factor=factor, **options)
    model, other = torch.nn.Sequential(*ours), torch.nn.Sequential(*theirs)
    train(build_inner(model, spec), list(model.parameters()))
    train(torch.optim.SGD(groups, **options), list(other.parameters()))
    assert all(same(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_parameters_keep_the_models_order_in_the_optimizers_state() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    kept = build_inner(model, OptimizerSpec(decay_all=False)).param_groups[0]["params"]
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))


@pytest.mark.parametrize("decay_all", [False, True])
def test_adamw_is_torchs(decay_all: bool) -> None:
    ours, theirs = (torch.nn.ParameterList(weights()) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    groups = [{"params": [theirs[0]]}, {"params": [theirs[1]], **({} if decay_all else {"weight_decay": 0.0})}]
    train(build_inner(ours, OptimizerSpec(name="adamw", decay_all=decay_all, **options)), list(ours))
    train(torch.optim.AdamW(groups, **options), list(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_frozen_parameter_is_left_alone() -> None:
    for name in ("sgd", "adamw"):
        layers = torch.nn.ParameterList(weights())
        layers[0].requires_grad_(False)
        before = layers[0].clone()
        optimizer = build_inner(layers, OptimizerSpec(name=name, decay_all=False, weight_decay=0.5))
        layers[1].grad = torch.ones_like(layers[1])
        optimizer.step()
        assert torch.equal(layers[0], before) and list(optimizer.state_dict()["state"]) == [1]
