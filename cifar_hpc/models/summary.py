"""Summary of the network's layers, from a forward pass on PyTorch's meta device, which computes no numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from cifar_hpc.config.spec import IMAGE_SIZE, ModelSpec
from cifar_hpc.models.improved_resnet import ImprovedResNet

Shape = tuple[int, ...]


class Layer(NamedTuple):
    """One call of a module that has no submodules.

    words: such as `3×3 convolution, stride 2`.
    shape: of its output for one image: channels, height, width.
    """

    words: str
    shape: Shape
    parameters: int


class Block(NamedTuple):
    """One of the parts that images pass one after the other, with its layers in the order in which they run.

    words: `stem`, `bottleneck`, `dropout 0.2`, `linear`.
    shortcut: the layers on the path around the others; empty where that is the identity.
    """

    words: str
    layers: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    shape: Shape
    parameters: int


class Architecture(NamedTuple):
    """The whole network. `features` is the shape of the head's input, after the pooling."""

    input: Shape
    blocks: tuple[Block, ...]
    features: Shape
    parameters: int


def describe(spec: ModelSpec) -> Architecture:
    """Describe the network of `spec`."""
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    ran: list[tuple[str, Layer]] = []
    with torch.device("meta"), torch.no_grad():
        model = ImprovedResNet(spec).eval()
        for path, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, _, output, path=path: ran.append((path, _layer(m, output))))
        model(torch.zeros(1, *shape))
    paths = ("stem", *(f"layers.{number}" for number in range(len(model.layers))), "head")
    blocks = tuple(_block(path, model.get_submodule(path), ran) for path in paths)
    return Architecture(shape, blocks, (model.head.in_features,), _parameters(model))


def _block(path: str, module: nn.Module, ran: Sequence[tuple[str, Layer]]) -> Block:
    inside = [(own, layer) for own, layer in ran if f"{own}.".startswith(f"{path}.")]
    layers = tuple(layer for own, layer in inside if ".shortcut" not in own)
    shortcut = tuple(layer for own, layer in inside if ".shortcut." in own)
    words = layers[0].words if len(layers) == 1 else type(module).__name__.lower()
    return Block("stem" if path == "stem" else words, layers, shortcut, layers[-1].shape, _parameters(module))


def _layer(module: nn.Module, output: torch.Tensor) -> Layer:
    return Layer(_words(module), tuple(output.shape[1:]), _parameters(module))


def _words(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"{module.kernel_size[0]}×{module.kernel_size[1]} convolution{stride}"
    if isinstance(module, nn.Dropout):
        return f"dropout {module.p:g}"
    known = {"BatchNorm2d": "batch normalisation", "LeakyReLU": "leaky ReLU", "ReLU": "ReLU"}
    name = type(module).__name__
    return known.get(name, name.lower())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
