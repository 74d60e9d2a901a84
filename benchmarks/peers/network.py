"""The report's network as its authors would write it: stock layers, 4,903,082 parameters."""

from __future__ import annotations

import torch
from torch import nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 convolutions around a shortcut."""

    def __init__(self, channels_in: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.LeakyReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class Network(nn.Module):
    """Input [B, 3, 32, 32] float, output logits [B, 10].

    Args:
        width: of the first layer's bottlenecks; the report's is 64. The others and the stem are in proportion.
        blocks: in each of the three layers.
    """

    def __init__(self, width: int = 64, blocks: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2), nn.LeakyReLU(inplace=True)
        )
        layers: list[nn.Module] = []
        channels = width // 2
        for number in range(3):
            for block in range(blocks):
                stride = 2 if number > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << number, stride, project=block == 0))
                channels = EXPANSION * (width << number)
            layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))
