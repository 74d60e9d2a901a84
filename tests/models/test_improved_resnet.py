"""ImprovedResNet: its size, what each option changes, and weights as a pure function of the seed."""

from __future__ import annotations

import pytest
import torch
from helpers import build_model
from torch import nn

from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.tensorfile import digest

TOY = ModelSpec(width_multiplier=0.125, blocks=(1, 1, 1), dropout=0.5)


def weights(model: nn.Module) -> str:
    return digest(model.state_dict())


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_parameters_of_the_report() -> None:
    assert sum(p.numel() for p in ImprovedResNet(ModelSpec()).parameters()) == 4_903_082


@pytest.mark.parametrize(
    ("spec", "stem", "channels", "blocks"),
    [
        (ModelSpec(), 32, 1024, 9),
        (TOY, 4, 128, 3),
        (ModelSpec(blocks=(1, 2), widths=(4, 6), stem_width=5), 5, 24, 3),
        (ModelSpec(blocks=(1,), widths=(1,), stem_width=1, width_multiplier=0.01), 1, 4, 1),
    ],
)
def test_widths_and_blocks(spec: ModelSpec, stem: int, channels: int, blocks: int) -> None:
    model = build_model(spec, 0).eval()
    first = model.stem[0]
    assert isinstance(first, nn.Conv2d)
    assert (first.out_channels, model.head.in_features) == (stem, channels)
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 1 + 3 * blocks + len(spec.blocks)
    assert len([m for m in model.modules() if isinstance(m, nn.Dropout)]) == len(spec.blocks)
    assert model(images(2)).shape == (2, 10)


def test_each_layer_but_the_first_halves_the_image() -> None:
    model = build_model(TOY, 0).eval()
    assert model.layers(model.stem(images())).shape == (4, 128, 8, 8)


@pytest.mark.parametrize(("name", "kind"), [("leaky_relu", nn.LeakyReLU), ("relu", nn.ReLU)])
def test_activations(name: str, kind: type[nn.Module]) -> None:
    model = build_model(ModelSpec(activation=name, width_multiplier=0.1), 0)  # type: ignore[arg-type]
    found = {type(m) for m in model.modules() if isinstance(m, (nn.LeakyReLU, nn.ReLU))}
    assert found == {kind}


def test_activations_compute_different_things() -> None:
    leaky, relu = (build_model(ModelSpec(activation=a, width_multiplier=0.1), 0) for a in ("leaky_relu", "relu"))
    assert weights(leaky) == weights(relu)
    assert not torch.equal(leaky.eval()(images()), relu.eval()(images()))


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights(build_model(TOY, 3))
    assert torch.equal(torch.random.get_rng_state(), before)  # and the global generator is left alone
    torch.manual_seed(2)
    assert weights(build_model(TOY, 3)) == first
    assert weights(build_model(TOY, 4)) != first
