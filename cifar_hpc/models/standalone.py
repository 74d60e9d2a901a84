"""ImprovedResNet and its trained weights, without the project that trained them. Needs torch alone; Pillow for files.

python model.py                       what the model is
python model.py cat.png dog.jpg       the class of each image, resized to the model's size where needed

import torch
from model import load
model = load("model.safetensors")     # in evaluation mode; model.classes has the names of the logits
logits = model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))      # yours: RGB, 0 to 255
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"F32": torch.float32, "I64": torch.int64}


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without a bias, which keeps the size where the stride is 1."""
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 convolutions around a shortcut (He et al. 2016, arXiv:1512.03385, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int, activation: nn.Module, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        layers = (conv(channels_in, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)) if project else ()
        self.shortcut = nn.Sequential(*layers)
        self.activation = activation

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(images)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.activation(x.add_(self.shortcut(images)))  # type: ignore[no-any-return]


class ImprovedResNet(nn.Module):
    """The network. Input [B, 3, 32, 32] float, normalised; output logits [B, classes]."""

    def __init__(self, spec: dict[str, Any], classes: int) -> None:
        super().__init__()
        stem, *widths = (max(1, round(w * spec["width_multiplier"])) for w in (spec["stem_width"], *spec["widths"]))
        activation = nn.LeakyReLU(inplace=True) if spec["activation"] == "leaky_relu" else nn.ReLU(inplace=True)
        self.stem = nn.Sequential(conv(3, stem, 3), nn.BatchNorm2d(stem), activation)
        layers: list[nn.Module] = []
        channels = stem
        for number, (blocks, width) in enumerate(zip(spec["blocks"], widths, strict=True)):
            for block in range(blocks):
                stride = 2 if number > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width, stride, activation, project=block == 0))
                channels = 4 * width
            layers.append(nn.Dropout(spec["dropout"]))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(images)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Model(nn.Module):
    """The network with its normalisation. `card`: what the weights' file says of itself; `classes`: names."""

    mean: Tensor
    std: Tensor

    def __init__(self, card: dict[str, str]) -> None:
        super().__init__()
        self.card, self.classes = card, json.loads(card["classes"])
        self.network = ImprovedResNet(json.loads(card["model"]), len(self.classes))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(json.loads(card[name])).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of `images`, uint8 [B, 3, 32, 32], RGB."""
        return self.network((images / 255 - self.mean) / self.std)  # type: ignore[no-any-return]


def load(file: str | Path) -> Model:
    """Load the model from its safetensors file (https://github.com/huggingface/safetensors#format) on the CPU."""
    content = bytearray(Path(file).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    model = Model(header.pop("__metadata__"))
    tensors = {}
    for name, entry in header.items():
        begin, stop = (end + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(content[begin:stop], dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    model.network.load_state_dict(tensors)
    return model.to(memory_format=torch.channels_last).eval()


def main(words: list[str]) -> None:
    """Print the class of each image file; without any, what the model is."""
    if "-h" in words or "--help" in words:
        return print(__doc__)
    beside = map(str, sorted(Path(__file__).parent.glob("*.safetensors")))
    weights = [word for word in words if word.endswith(".safetensors")] or [*beside]
    if len(weights) != 1:
        sys.exit(f"which weights? {' '.join(weights) or 'no .safetensors file is here'}: name one")
    model, files = load(weights[0]), [word for word in words if word not in weights]
    if not files:
        keys = ("run", "weights", "epoch", "test_accuracy", "data", "parameters", "classes")
        print(*(f"{key:14}{model.card[key]}" for key in keys if key in model.card), sep="\n")
        return
    import numpy as np
    from PIL import Image

    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except (OSError, ValueError) as error:
            sys.exit(f"{file}: {error}")
        image = image if image.size == (32, 32) else image.resize((32, 32), Image.Resampling.BICUBIC)
        with torch.no_grad():
            shares = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).softmax(1)[0]
        best = int(shares.argmax())
        print(f"{file}: {model.classes[best]} ({100 * float(shares[best]):.1f}%)")


if __name__ == "__main__":
    main(sys.argv[1:])
