"""ImprovedResNet: the report's bottleneck ResNet, 4,903,082 parameters by default. Needs torch alone."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 convolutions around a shortcut (He et al. 2016, arXiv:1512.03385, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int, activation: str, project: bool) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.conv1, self.bn1 = _conv(channels_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, channels_out, 1), nn.BatchNorm2d(channels_out)
        layers = (_conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out)) if project else ()
        self.shortcut = nn.Sequential(*layers)  # without layers the identity
        self.activation = _activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(input)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.activation(x.add_(self.shortcut(input)))  # type: ignore[no-any-return]


class ImprovedResNet(nn.Module):
    """The report's network. Input [B, 3, S, S] float, output logits [B, classes].

    Args:
        spec: the keys `model.*` of a job file, as attributes or as a mapping.
    """

    def __init__(self, spec: Any, classes: int = 10) -> None:
        super().__init__()
        spec = SimpleNamespace(**spec) if isinstance(spec, Mapping) else spec
        stem, *widths = (max(1, round(w * spec.width_multiplier)) for w in (spec.stem_width, *spec.widths))
        self.stem = nn.Sequential(_conv(3, stem, 3), nn.BatchNorm2d(stem), _activation(spec.activation))
        layers: list[nn.Module] = []
        channels = stem
        for number, (blocks, width) in enumerate(zip(spec.blocks, widths, strict=True)):
            stride = 1 if number == 0 else 2
            for block in range(blocks):
                layers.append(Bottleneck(channels, width, stride if block == 0 else 1, spec.activation, block == 0))
                channels = EXPANSION * width
            layers.append(nn.Dropout(spec.dropout))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.stem(images))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


def _activation(name: str) -> nn.Module:
    return nn.LeakyReLU(inplace=True) if name == "leaky_relu" else nn.ReLU(inplace=True)
