"""What the network consists of, as it is found by running it."""

from __future__ import annotations

import pytest
import torch
from helpers import INFO, build_model
from torchvision.models import resnet18, vit_b_16

from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.models.summary import Architecture, Layer, describe, table

TOY = ModelSpec(activation="relu", dropout=0.1, stem_width=8, blocks=(2, 1), widths=(4, 8))


@pytest.fixture(scope="module")
def report() -> Architecture:
    return describe(ModelSpec(), INFO)


def test_the_reports_network(report: Architecture) -> None:
    assert report.parameters == 4_903_082
    assert (report.input, report.features) == ((3, 32, 32), (1024,))
    assert [(block.words, block.shape) for block in report.blocks] == [
        ("stem", (32, 32, 32)),
        *[("bottleneck", (256, 32, 32))] * 3,
        ("dropout 0.2", (256, 32, 32)),
        *[("bottleneck", (512, 16, 16))] * 3,
        ("dropout 0.2", (512, 16, 16)),
        *[("bottleneck", (1024, 8, 8))] * 3,
        ("dropout 0.2", (1024, 8, 8)),
        ("linear", (10,)),
    ]


def test_the_parts_have_all_parameters(report: Architecture) -> None:
    assert sum(block.parameters for block in report.blocks) == report.parameters
    for block in report.blocks:
        assert block.parameters == sum(layer.parameters for layer in (*block.layers, *block.shortcut))


def test_a_blocks_layers_stand_in_the_order_in_which_they_run(report: Architecture) -> None:
    first_of_the_second_size = report.blocks[5]
    norm, activation = "batch normalisation", "leaky ReLU"
    assert [(layer.words, layer.shape) for layer in first_of_the_second_size.layers] == [
        ("1×1 convolution", (128, 32, 32)), (norm, (128, 32, 32)), (activation, (128, 32, 32)),
        ("3×3 convolution, stride 2", (128, 16, 16)), (norm, (128, 16, 16)), (activation, (128, 16, 16)),
        ("1×1 convolution", (512, 16, 16)), (norm, (512, 16, 16)), (activation, (512, 16, 16)),
    ]  # fmt: skip
    assert [(layer.words, layer.shape) for layer in first_of_the_second_size.shortcut] == [
        ("1×1 convolution, stride 2", (512, 16, 16)),
        (norm, (512, 16, 16)),
    ]


def test_the_shortcut_of_later_blocks_is_the_identity(report: Architecture) -> None:
    assert [bool(block.shortcut) for block in report.blocks if block.words == "bottleneck"] == [True, False, False] * 3


def test_it_is_the_model_that_is_trained() -> None:
    model = build_model(TOY, seed=0)
    found = describe(TOY, INFO)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.blocks[-2].shape == tuple(model.eval().layers(model.stem(torch.zeros(1, 3, 32, 32))).shape[1:])
    assert found.blocks[0].layers[2].words == "ReLU"
    assert [block.words for block in found.blocks] == [
        "stem", "bottleneck", "bottleneck", "dropout 0.1", "bottleneck", "dropout 0.1", "linear",
    ]  # fmt: skip


def test_a_model_that_no_memory_holds_can_be_described() -> None:
    assert describe(ModelSpec(widths=(64, 128, 100_000)), INFO).parameters > 10**11


def test_a_table_of_any_network_adds_up() -> None:
    network = resnet18(num_classes=10)
    rows = table(network, INFO, 100)
    assert [name for name, _ in rows][:4] == ["conv1", "bn1", "relu", "maxpool"] and len(rows) == 60
    assert rows[0][1] == Layer("7×7 convolution, stride 2", (64, 16, 16), 9408)
    assert table(network, INFO, 20)[4] == ("layer1.0", Layer("BasicBlock", (64, 8, 8), 73984))
    assert len(table(network, INFO, 5)) == 10  # one for each part of the network, at least
    every = sum(parameter.numel() for parameter in network.parameters())
    for most in (20, 5):
        assert sum(layer.parameters for _, layer in table(network, INFO, most)) == every


def test_parameters_outside_of_layers_are_in_the_table() -> None:
    network = vit_b_16(image_size=32, num_classes=10)
    rows = table(network, INFO, 60)
    assert rows[-1] == ("other parameters", Layer("", (), 768 + 5 * 768))
    assert sum(layer.parameters for _, layer in rows) == sum(p.numel() for p in network.parameters())
