"""Summary of a network's layers, from a forward pass: of the built-in one by blocks, of others as a table."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.data.info import DatasetInfo
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


def describe(spec: ModelSpec, info: DatasetInfo) -> Architecture:
    """Describe the built-in network of `spec`, on PyTorch's meta device, which computes no numbers."""
    with torch.device("meta"):
        model = ImprovedResNet(spec, len(info.classes)).eval()
        ran, shape = _run(model, info)
    paths = ("stem", *(f"layers.{number}" for number in range(len(model.layers))), "head")
    blocks = tuple(_block(path, model.get_submodule(path), ran) for path in paths)
    return Architecture(shape, blocks, (model.head.in_features,), _parameters(model))


def table(network: nn.Module, info: DatasetInfo, most: int) -> list[tuple[str, Layer]]:
    """List (name, layer) of any network in the order in which they run, in at most about `most` rows.

    Where there are more, layers are put together into the modules that hold them.
    """
    ran, _ = _run(network.eval(), info)
    depth = max((name.count(".") + 1 for name, _ in ran), default=1)
    rows = ran
    while len(rows) > most and depth > 1:
        depth -= 1
        last = {".".join(name.split(".")[:depth]): layer for name, layer in ran}  # the last output of each
        rows = []
        for name, layer in last.items():
            module = network.get_submodule(name)
            rows.append((name, Layer(_words(module), layer.shape, _parameters(module))))
    left = _parameters(network) - sum(
        layer.parameters for _, layer in {name: (name, one) for name, one in rows}.values()
    )
    return rows + ([("other parameters", Layer("", (), left))] if left else [])


def _run(network: nn.Module, info: DatasetInfo) -> tuple[list[tuple[str, Layer]], Shape]:
    """Run a network on one image; return by name the modules that ran without running others, and the image's shape."""
    ran: list[tuple[str, Layer]] = []
    shape = (3, info.image_size, info.image_size)
    hooks = [
        module.register_forward_hook(lambda m, _, output, path=path: ran.append((path, _layer(m, output))))
        for path, module in network.named_modules()
        if path
    ]
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    holders = {".".join(path.split(".")[:depth]) for path, _ in ran for depth in range(1, path.count(".") + 1)}
    return [(path, layer) for path, layer in ran if path not in holders], shape


def _block(path: str, module: nn.Module, ran: Sequence[tuple[str, Layer]]) -> Block:
    inside = [(own, layer) for own, layer in ran if f"{own}.".startswith(f"{path}.")]
    layers = tuple(layer for own, layer in inside if ".shortcut" not in own)
    shortcut = tuple(layer for own, layer in inside if ".shortcut." in own)
    words = layers[0].words if len(layers) == 1 else type(module).__name__.lower()
    return Block("stem" if path == "stem" else words, layers, shortcut, layers[-1].shape, _parameters(module))


def _layer(module: nn.Module, output: torch.Tensor) -> Layer:
    shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
    return Layer(_words(module), shape, _parameters(module))


def _words(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"{module.kernel_size[0]}×{module.kernel_size[1]} convolution{stride}"
    if isinstance(module, nn.Dropout):
        return f"dropout {module.p:g}"
    known = {"BatchNorm2d": "batch normalisation", "LeakyReLU": "leaky ReLU", "Linear": "linear"}
    name = type(module).__name__
    return known.get(name, name)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
