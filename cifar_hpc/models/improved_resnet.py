"""ImprovedResNet: the report's bottleneck ResNet for 32x32 images, 4,903,082 parameters by default."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cifar_hpc.config.spec import CLASSES, ModelSpec
from cifar_hpc.models.layers import KeyedDropout, ShardBatchNorm2d, batch_norms
from cifar_hpc.randomness import Stream, mix

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 convolutions around a shortcut (He et al. 2016, arXiv:1512.03385, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int, activation: str, project: bool) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.conv1, self.bn1 = _conv(channels_in, width, 1), ShardBatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), ShardBatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, channels_out, 1), ShardBatchNorm2d(channels_out)
        self.shortcut = (
            nn.Sequential(_conv(channels_in, channels_out, 1, stride), ShardBatchNorm2d(channels_out))
            if project
            else nn.Identity()
        )
        self.activation = _activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(input)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.activation(x.add_(self.shortcut(input)))  # type: ignore[no-any-return]


class ImprovedResNet(nn.Module):
    """The report's network. Input [B, 3, 32, 32] float, output logits [B, 10]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        stem = spec.scaled(spec.stem_width)
        self.stem = nn.Sequential(_conv(3, stem, 3), ShardBatchNorm2d(stem), _activation(spec.activation))
        layers: list[nn.Module] = []
        channels = stem
        for number, (blocks, width) in enumerate(zip(spec.blocks, map(spec.scaled, spec.widths), strict=True)):
            stride = 1 if number == 0 else 2
            for block in range(blocks):
                layers.append(Bottleneck(channels, width, stride if block == 0 else 1, spec.activation, block == 0))
                channels = EXPANSION * width
            layers.append(KeyedDropout(spec.dropout))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)
        # Found once: walking through all modules takes a tenth of a millisecond, and would be done at each step.
        self._norms = batch_norms(self)
        self._dropouts = [m for m in self.modules() if isinstance(m, KeyedDropout)]

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.stem(images))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def set_key(self, key: int) -> None:
        """Make the next forward pass's dropout masks a function of `key`."""
        generator = self._dropouts[0].generator
        if generator is None:
            generator = torch.Generator(device=self.head.weight.device)
            for layer in self._dropouts:
                layer.generator = generator
        generator.manual_seed(key)

    def set_update_statistics(self, update: bool) -> None:
        """Switch the updates of BatchNorm's running statistics in the next forward passes in training mode."""
        for module in self._norms:
            module.update_statistics = update


def build_model(spec: ModelSpec, seed: int) -> ImprovedResNet:
    """The network on the CPU, its initial weights a function of `seed` alone (PyTorch's default initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(mix(seed, Stream.INIT))
        return ImprovedResNet(spec)


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


def _activation(name: str) -> nn.Module:
    return nn.LeakyReLU(inplace=True) if name == "leaky_relu" else nn.ReLU(inplace=True)
