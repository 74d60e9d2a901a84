"""Users' networks that would not give the same bits are refused by name before the first step; others are left as they
are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from cifar_hpc.errors import RunFailedError
from cifar_hpc.models.exact import make_exact
from cifar_hpc.models.network import parts
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.network_check import check_gradients, check_network

CODE = Path("/nowhere")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


class Net(nn.Module):
    """A network whose middle is given, as a module or a function."""

    def __init__(self, middle: Callable[[Tensor], Any], head: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.middle = middle if isinstance(middle, nn.Module) else Function(middle)
        self.head = nn.Linear(8, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x)  # type: ignore[no-any-return]


class Remembers(nn.Module):
    """Gives another output at each call, without drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Tied(nn.Module):
    """Two layers with one weight, a frozen one, and constant buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.ones(8, 1, 1))
        self.register_buffer("passing", torch.ones(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.first(x))) * self.scale + self.passing  # type: ignore[no-any-return]


def check(network: nn.Module, count: int = 2) -> None:
    """Check a network and its gradients, as the engine does at a start."""
    exact = make_exact(network)
    logits = check_network(network, exact, IMAGES[:count], 5, CODE)
    check_gradients(network, logits.sum(), exact, CODE)


GOOD: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(8),
    "frozen BatchNorm": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "cumulative BatchNorm": lambda: nn.BatchNorm2d(8, momentum=None),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)),
    "other norms": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm([8, 4, 4])),
    "attention": lambda: Attention(0.0),
    "tied": Tied,
    "weight norm": lambda: weight_norm(nn.Conv2d(8, 8, 1)),
    "checkpointing": lambda: Function(lambda x: checkpoint(torch.sin, x, use_reentrant=False)),
    "in place": lambda: nn.ReLU(inplace=True),
}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "F.dropout": (
        lambda: lambda x: F.dropout(x, 0.5),
        r"middle \(Function\) draws random numbers by itself. HINT: Masks",
    ),
    "F.dropout in evaluation": (lambda: lambda x: F.dropout(x, 0.5, True), r"middle \(Function\) draws random"),
    "torch.rand": (lambda: lambda x: x + torch.rand(1), r"middle \(Function\) draws"),
    "Python's random": (lambda: lambda x: x * random.random(), r"middle \(Function\) draws"),
    "numpy's random": (lambda: lambda x: x * np.random.rand(), r"middle \(Function\) draws"),
    "attention's dropout": (
        lambda: Attention(0.1),
        r"middle.attention \(MultiheadAttention\) .* HINT: give it dropout=0",
    ),
    "RReLU": (nn.RReLU, r"middle \(RReLU\) draws random numbers by itself. HINT: use LeakyReLU"),
    "FractionalMaxPool": (lambda: nn.FractionalMaxPool2d(2, 2), r"middle \(FractionalMaxPool2d\) draws"),
    "a generator of its own": (
        lambda: lambda x: x * torch.rand(1, generator=_GENERATOR),
        r"middle gives another output for the same input",
    ),
    "memory": (Remembers, r"middle gives another output for the same input"),
    "spectral norm": (lambda: spectral_norm(nn.Conv2d(8, 8, 1)), r"the buffer middle.parametrizations\S* changes"),
    "running InstanceNorm": (lambda: nn.InstanceNorm2d(8, track_running_stats=True), "the buffer middle.running_mean"),
    "an error": (lambda: lambda x: x[:, :3] @ x, "a forward pass of 2 images fails: RuntimeError"),
    "a tuple": (lambda: lambda x: (x, x), "a forward pass of 2 images fails: AttributeError"),
    "in place behind a sigmoid": (
        lambda: lambda x: x.sigmoid().mul_(2),
        "a backward pass fails: RuntimeError: one of the variables needed",
    ),
    "reentrant checkpointing": (
        lambda: lambda x: checkpoint(torch.sin, x, use_reentrant=True),
        r"a backward pass fails: RuntimeError: .* HINT: checkpoint\(..., use_reentrant=False\)",
    ),
    "a buffer of the first pass": (lambda: _Late(), "middle.mask is registered in a forward pass, .* HINT: register"),
    "dropout computed again": (
        lambda: nn.Sequential(_Checkpointed(nn.Dropout(0.5))),
        "dropout draws other masks in the backward pass",
    ),
}
_GENERATOR = torch.Generator()


class _Late(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones_like(x[0]))
        return x * self.mask


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(inner, nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_network_passes_and_is_left_as_it_was(name: str) -> None:
    torch.manual_seed(3)
    network = Net(GOOD[name]())
    before, state = digest(parts(network)), torch.get_rng_state()
    check(network)
    assert digest(parts(network)) == before and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant checkpointing
@pytest.mark.parametrize("name", BAD)
def test_a_bad_network_is_refused_by_name(name: str) -> None:
    make, words = BAD[name]
    with pytest.raises(RunFailedError) as raised:
        check(Net(make()))
    assert re.search(words, str(raised.value)), str(raised.value)
    assert str(raised.value).startswith("model.target: ") and "\n" not in str(raised.value)


def test_a_network_may_change_its_input() -> None:
    class Shifted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    before = digest(IMAGES)
    check(Shifted(nn.Identity()))
    assert digest(IMAGES) == before


def test_the_advice_about_a_kernel_that_is_not_deterministic_stays() -> None:
    def kernel(x: Tensor) -> Tensor:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    with pytest.raises(RuntimeError, match=r"^cumsum_cuda_kernel does not have"):
        check(Net(kernel))


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(RunFailedError, match=r"gives torch.float32 \[2, 1000\] for 2 images of 5 classes; allowed"):
        check(Net(nn.Identity(), head=1000))


@pytest.mark.parametrize("kind", [tuple, list])
def test_auxiliary_outputs_are_refused_and_not_taken_for_another_number_of_classes(kind: type) -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return kind([logits, logits]) if self.training else logits

    words = rf"in training mode the network gives a {kind.__name__} for .*HINT: return the logits alone, in both modes"
    with pytest.raises(RunFailedError, match=words) as raised:
        check(Auxiliary(nn.Identity()))
    assert "num_classes" not in str(raised.value)


def test_parameters_without_a_gradient_are_named() -> None:
    network = Net(nn.Identity())
    network.spare = nn.Linear(2, 2)
    with pytest.raises(RunFailedError, match=r"spare.weight, spare.bias get no gradient"):
        check(network)
    network.spare.requires_grad_(False)
    check(network)


def test_an_image_alone_is_tried_where_a_shard_may_get_one() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 6), nn.Flatten(), nn.BatchNorm1d(5))
    check(network)
    with pytest.raises(
        RunFailedError, match=r"a forward pass of 1 image fails: ValueError: Expected more than 1 value"
    ):
        check(network, count=1)


def test_the_users_line_is_shown(tmp_path: Path) -> None:
    (tmp_path / "0123").mkdir()
    file = tmp_path / "0123" / "mine.py"
    file.write_text("def middle(x):\n    return x.nothing\n")
    names: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    network = Net(names["middle"])
    with pytest.raises(RunFailedError, match=r"fails: mine.py, line 2: return x.nothing: AttributeError: "):
        check_network(network, make_exact(network), IMAGES, 5, tmp_path)


def test_masks_of_the_check_are_not_those_of_training() -> None:
    network = Net(nn.Dropout(0.5))
    exact = make_exact(network)
    check_network(network, exact, IMAGES, 5, CODE)
    exact.set_key(7, CPU)
    assert exact.calls == 0
