"""A network of one's own: WideResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146), for images of any size."""

from torch import Tensor, nn


class Block(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution twice, with dropout between them, around a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = channels_in == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        z = self.conv2(self.dropout(self.norm2(self.conv1(y)).relu()))
        return z + (x if isinstance(self.shortcut, nn.Identity) else self.shortcut(y))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks, `widen` times as wide as a plain ResNet's."""

    def __init__(self, depth: int = 16, widen: int = 4, dropout: float = 0.3, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for number in range((depth - 4) // 6):
                layers.append(Block(channels, widen * width, 1 if number else stride, dropout))
                channels = widen * width
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))  # type: ignore[no-any-return]
