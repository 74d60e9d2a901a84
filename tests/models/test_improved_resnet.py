"""ImprovedResNet: its size, what each option changes, and masks and weights as pure functions of keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.models.improved_resnet import ImprovedResNet, KeyedDropout, build_model
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
    assert len(model.norms) == 1 + 3 * blocks + len(spec.blocks)
    assert len([m for m in model.modules() if isinstance(m, KeyedDropout)]) == len(spec.blocks)
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


def masked(model: ImprovedResNet, key: int) -> torch.Tensor:
    model.set_key(key)
    return model(images()).detach()


def test_dropout_masks_are_a_function_of_the_key_alone() -> None:
    model = build_model(TOY, 0)
    first = masked(model, 5)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert not torch.equal(masked(model, 6), first)
    assert torch.equal(masked(model, 5), first)
    assert torch.equal(masked(build_model(TOY, 0), 5), first)  # another process's model
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_keeps_the_mean_and_the_layers_differ() -> None:
    layers = [KeyedDropout(0.5), KeyedDropout(0.5)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.generator = generator
    one, two = (layer(torch.ones(100_000)) for layer in layers)
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert float((one == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(one, two)


def test_dropout_is_off_in_evaluation_and_at_rate_zero() -> None:
    x = torch.ones(8)
    assert KeyedDropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0).train()(x) is x


def test_dropout_without_a_key_is_refused() -> None:
    with pytest.raises(RuntimeError, match="set_key"):
        build_model(TOY, 0)(images())


def test_statistics_follow_only_where_asked_and_the_output_does_not_depend_on_it() -> None:
    model = build_model(TOY, 0)
    before = digest(dict(model.named_buffers()))
    model.set_update_statistics(False)
    apart = masked(model, 1)
    assert digest(dict(model.named_buffers())) == before
    model.set_update_statistics(True)
    assert torch.equal(masked(model, 1), apart)
    assert digest(dict(model.named_buffers())) != before
