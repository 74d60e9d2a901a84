"""Exact layers: the same results as PyTorch's own but for whose randomness it is, and nothing global is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import CPU
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import StochasticDepth

from cifar_hpc.errors import SpecError
from cifar_hpc.models import exact
from cifar_hpc.models.exact import ExactLayers, ShardBatchNorm, keep_mask, make_exact
from cifar_hpc.tensorfile import digest

RATE = 0.3
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Dropout": (nn.Dropout(RATE), (40, 8, 4, 4)),
    "Dropout of vectors": (nn.Dropout(RATE), (64, 80)),
    "Dropout in place": (nn.Dropout(RATE, inplace=True), (64, 80)),
    "Dropout1d": (nn.Dropout1d(RATE), (40, 50, 3)),
    "Dropout1d of one": (nn.Dropout1d(RATE), (2000, 3)),
    "Dropout2d": (nn.Dropout2d(RATE), (40, 50, 3, 3)),
    "Dropout3d": (nn.Dropout3d(RATE), (40, 50, 2, 2, 2)),
    "Dropout3d of one": (nn.Dropout3d(RATE), (2000, 2, 2, 2)),
    "AlphaDropout": (nn.AlphaDropout(RATE), (64, 80)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(RATE), (40, 50, 3)),
    "StochasticDepth by sample": (StochasticDepth(RATE, "row"), (2000, 3, 2, 2)),
    "StochasticDepth by batch": (StochasticDepth(RATE, "batch"), (4, 3)),
}


def pattern(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(values that the layer gives for ones, sorted; which units of the input it drops as a whole)."""
    out = layer.train()(torch.ones(shape))
    return out.unique(), out


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_pytorchs_own_gives(name: str) -> None:
    layer, shape = LAYERS[name]
    drawn: dict[bool, set[float]] = {False: set(), True: set()}
    shares: dict[bool, list[float]] = {False: [], True: []}
    grouped: dict[bool, bool] = {}
    swapped = nn.Sequential(_copy(layer))
    layers = make_exact(swapped)
    for turn in range(40):
        layers.set_key(turn, CPU)
        for ours, network in ((False, nn.Sequential(layer)), (True, swapped)):
            torch.manual_seed(turn)
            values, out = pattern(network, shape)
            drawn[ours] |= {round(float(v), 3) for v in values}
            lowest = min(round(float(v), 3) for v in values)
            shares[ours].append(float((out.round(decimals=3) == lowest).float().mean()) if len(values) > 1 else -1)
            units = out.flatten(2) if out.dim() > 2 else out[..., None]
            grouped[ours] = grouped.get(ours, True) and bool((units == units[..., :1]).all())
    assert sorted(drawn[True]) == pytest.approx(sorted(drawn[False]), abs=2e-3)
    assert grouped[True] == grouped[False]
    if "batch" not in name:
        assert sum(shares[True]) / 40 == pytest.approx(RATE, abs=0.01)


def _copy(layer: nn.Module) -> nn.Module:
    other = type(layer).__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    return other


@pytest.mark.parametrize("name", LAYERS)
def test_masks_are_a_function_of_the_key_alone(name: str) -> None:
    layer, shape = LAYERS[name]
    network = nn.Sequential(_copy(layer), _copy(layer))
    layers = make_exact(network)
    state = torch.get_rng_state()
    x = torch.rand(shape) + 1
    layers.set_key(5, CPU)
    first = network(x.clone())
    layers.set_key(5, CPU)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(network(x.clone()), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = []
    for key in range(20):
        layers.set_key(key, CPU)
        others.append(digest(network(x.clone())))
    assert len(set(others)) > 1
    assert network.eval()(x) is x


def test_two_layers_and_two_calls_of_one_draw_differently() -> None:
    drop = nn.Dropout(0.5)
    network = nn.Sequential(drop, nn.Dropout(0.5))
    layers = make_exact(network)
    layers.set_key(1, CPU)
    masks = [network[0](torch.ones(1000)), network[0](torch.ones(1000)), network[1](torch.ones(1000))]
    assert len({digest(mask) for mask in masks}) == 3 and layers.calls == 3


def test_a_mask_does_not_depend_on_how_many_elements_follow_nor_on_how_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = torch.tensor(77)
    many = keep_mask(key, 1_000_003, 0.2, torch.float32)
    assert torch.equal(keep_mask(key, 1001, 0.2, torch.float32), many[:1001])
    assert torch.equal(keep_mask(key, 1001, 0.2, torch.bfloat16).float(), many[:1001])
    monkeypatch.setattr(exact.torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(keep_mask(key, 1_000_003, 0.2, torch.float32), many)


def test_masks_are_contract() -> None:
    """Other numbers would change the bits of every run with dropout."""
    found = digest(keep_mask(torch.tensor(1234567), 300_001, 0.25, torch.float32))[:16]
    assert found == "d7a5f25319608e27"


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_masks_look_random(rate: float) -> None:
    """Shares and correlations are those of independent draws, within 5 standard deviations."""
    count = 2**22
    share = 1 - round(rate * 2**16) / 2**16
    masks = [(keep_mask(torch.tensor(key), count, rate, torch.float64) - share) / math.sqrt(share * (1 - share))
             for key in (0, 1, 2**40)]  # fmt: skip
    sums = [mask.sum() for mask in masks] + [(masks[0] * other).sum() for other in masks[1:]]
    sums += [(masks[0][lag:] * masks[0][:-lag]).sum() for lag in (1, 2, 3, 4, 5, 8, 64, 1024, 2**18 - 1, 2**18, 2**19)]
    assert max(abs(float(value)) for value in sums) / math.sqrt(count) < 5


@pytest.mark.parametrize("rate", [0.0, 1.0, 1 - 1e-9])
def test_extreme_rates(rate: float) -> None:
    for layer in (nn.Dropout(rate), nn.Dropout2d(rate), nn.AlphaDropout(rate), StochasticDepth(rate, "row")):
        network = nn.Sequential(layer)
        make_exact(network).set_key(0, CPU)
        out = network(torch.ones(8, 4, 2, 2))
        assert out.eq(1 if rate == 0 else 0).all()


def test_a_network_of_torchvision_keeps_names_weights_and_classes() -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=7)
    before, names = digest(network.state_dict()), [name for name, _ in network.named_modules()]
    layers = make_exact(network)
    assert digest(network.state_dict()) == before and [name for name, _ in network.named_modules()] == names
    assert len(layers.norms) == 20 and not layers.draws
    assert all(isinstance(norm, nn.BatchNorm2d) and isinstance(norm, ShardBatchNorm) for norm in layers.norms)
    assert repr(network.bn1) == repr(nn.BatchNorm2d(64))
    assert len(make_exact(network).norms) == 20, "a second time changes nothing"


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (6, 3, 4, 4)), (nn.BatchNorm3d, (6, 3, 2, 2, 2))]
)
def test_statistics_follow_only_where_asked_and_the_output_does_not_depend_on_it(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    norm: Any = kind(3)
    plain: Any = kind(3)
    layers = make_exact(nn.Sequential(norm))
    x = torch.randn(shape)
    before = digest(norm.state_dict())
    layers.set_update_statistics(False)
    apart = norm(x)
    assert digest(norm.state_dict()) == before
    layers.set_update_statistics(True)
    assert torch.equal(norm(x), apart) and torch.equal(plain(x), apart)
    assert torch.equal(norm(x + 1), plain(x + 1)), "a layer that the network uses twice"
    layers.count_batches()
    assert digest(norm.state_dict()) == digest(plain.state_dict()) != before
    with pytest.raises(ValueError, match="expected"):
        norm(torch.randn(2, 3, 2, 2, 2, 2))


class Named(nn.Dropout):
    """A subclass that computes as its parent does."""

    def words(self) -> str:
        return "mine"


class Own(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input * 2


def test_subclasses_are_swapped_where_they_compute_what_pytorch_does() -> None:
    network = nn.Sequential(Named(0.5), Own(0.5))
    make_exact(network).set_key(0, CPU)
    assert network[0].words() == "mine" and isinstance(network[0], Named)
    assert set(network(torch.ones(1000)).unique().tolist()) == {0.0, 4.0}


def test_what_has_no_exact_kind_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    with pytest.raises(SpecError, match=r"^model.target: 1 is SyncBatchNorm"):
        make_exact(network)


def test_dropout_without_a_key_is_refused() -> None:
    network = nn.Sequential(nn.Dropout(0.5))
    make_exact(network)
    with pytest.raises(RuntimeError, match="set_key"):
        network(torch.ones(4))


def test_layers_without_dropout_need_no_key() -> None:
    layers = ExactLayers(nn.Sequential(nn.Linear(2, 2)))
    layers.set_key(0, CPU)
    assert layers.norms == [] and layers.calls == 0
