"""Summary of the network's layers, from a forward pass on PyTorch's meta device, which computes no numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cifar_hpc.config.spec import IMAGE_SIZE, ModelSpec
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.models.layers import KeyedDropout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A module without others in it, each time it runs.

    words: such as `3×3 convolution, stride 2`.
    shape: of its output for one image: channels, height, width.
    """

    path: str
    words: str
    shape: Shape
    parameters: int


@dataclass(frozen=True)
class Block:
    """One of the parts that images go through one after the other, with its layers in the order in which they run.

    words: `stem`, `bottleneck`, `dropout 0.2`, `linear`.
    shortcut: those of its layers that are on the way around the others; empty where that is the identity.
    """

    words: str
    layers: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    shape: Shape
    parameters: int


@dataclass(frozen=True)
class Architecture:
    """The whole network. `features` is the shape of what the head takes, after the pooling."""

    input: Shape
    blocks: tuple[Block, ...]
    features: Shape
    parameters: int


def describe(spec: ModelSpec) -> Architecture:
    """Describe the network of `spec`."""
    with torch.device("meta"):
        model = ImprovedResNet(spec).eval()
        images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    parts: dict[str, nn.Module] = {"stem": model.stem}
    parts |= {f"layers.{number}": layer for number, layer in enumerate(model.layers)}
    parts["head"] = model.head
    ran: list[Layer] = []
    shapes: dict[str, Shape] = {}
    features: list[Shape] = []
    for path, module in model.named_modules():
        if path in parts:
            module.register_forward_hook(lambda m, i, output, path=path: shapes.update({path: _shape(output)}))
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, output, path=path: ran.append(_layer(path, m, output)))
    model.head.register_forward_pre_hook(lambda module, inputs: features.append(_shape(inputs[0])))
    with torch.no_grad():
        model(images)
    blocks = tuple(_block(path, module, shapes[path], ran) for path, module in parts.items())
    return Architecture(_shape(images), blocks, features[0], _parameters(model))


def _block(path: str, module: nn.Module, shape: Shape, ran: list[Layer]) -> Block:
    layers = [layer for layer in ran if layer.path == path or layer.path.startswith(f"{path}.")]
    around = [layer for layer in layers if layer.path.startswith(f"{path}.shortcut.")]
    inside = [layer for layer in layers if layer not in around and layer.words != "identity"]
    words = inside[0].words if len(layers) == 1 else type(module).__name__.lower()
    return Block("stem" if path == "stem" else words, tuple(inside), tuple(around), shape, _parameters(module))


def _layer(path: str, module: nn.Module, output: Tensor) -> Layer:
    return Layer(path, _words(module), _shape(output), _parameters(module))


def _words(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"{module.kernel_size[0]}×{module.kernel_size[1]} convolution{stride}"
    if isinstance(module, nn.BatchNorm2d):
        return "batch normalisation"
    if isinstance(module, KeyedDropout):
        return f"dropout {module.rate:g}"
    known = {nn.LeakyReLU: "leaky ReLU", nn.ReLU: "ReLU", nn.Identity: "identity"}
    return known.get(type(module), type(module).__name__.lower())


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape[1:])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
