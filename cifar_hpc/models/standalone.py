"""A trained network and its weights, without the project that trained them. Needs torch alone; Pillow for files.

python model.py                       what the model is
python model.py cat.png dog.jpg       the class of each image; photographs are cut to a square, and resized

import torch
from model import load
model = load("model.safetensors")     # in evaluation mode; model.classes has the names of the logits
size = model.image_size
logits = model(torch.zeros(1, 3, size, size, dtype=torch.uint8))      # yours: RGB, 0 to 255
"""

import importlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


_loaded: list[Path] = []  # folders of the networks' code so far


class Model(nn.Module):
    """A network with its normalisation.

    Attributes:
        card: what the weights' file says of itself.
        classes: names, in the order of the logits.
        image_size: height and width of the images, in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, card: Mapping[str, str]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.classes = [str(name) for name in json.loads(card["classes"])]
        self.image_size = int(card.get("image_size", 32))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(json.loads(card[name])).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of `images`, uint8 [B, 3, image_size, image_size], RGB."""
        return self.network((images / 255 - self.mean) / self.std)  # type: ignore[no-any-return]


def read(file: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of a safetensors file (https://github.com/huggingface/safetensors#format)."""
    content = bytearray(Path(file).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    card = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, stop = (end + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(content[begin:stop], dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return card, tensors


def load(file: str | Path) -> Model:
    """Load the model on the CPU; its network's code is in the folder model_code beside the file, or installed."""
    card, tensors = read(file)
    if "network" not in card:
        raise ValueError(f"{file}: an older version exported it, with another model.py; export it again")
    folder = Path(file).resolve().parent / "model_code" / card["code"]
    sys.path[:0] = [str(folder / card["path"]), str(folder)]
    for other, module in list(sys.modules.items()):  # files of another model may have the same names
        place_of = Path(getattr(module, "__file__", None) or "/")
        if any(place_of.is_relative_to(loaded) for loaded in _loaded if loaded != folder):
            del sys.modules[other]
    _loaded.append(folder)
    place, _, name = card["network"].partition(":")
    make: Any = importlib.import_module(place)
    for part in name.split("."):
        make = getattr(make, part)
    return assemble(make(**json.loads(card["arguments"])), card, tensors)


def assemble(network: nn.Module, card: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Model:
    """Put weights into a network; a weight that several of its modules share is in the file once."""
    wrong = network.load_state_dict(tensors, strict=False)
    names = dict([*network.named_parameters(), *network.named_buffers()])  # each tensor under its first name
    if wrong.unexpected_keys or any(name in names for name in wrong.missing_keys):
        raise ValueError(f"the weights are not those of {card['network']}: {', '.join([*wrong[0], *wrong[1]][:5])}")
    for parameter in network.parameters():
        if parameter.dim() == 4:  # as convolutions are fastest
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return Model(network, card).eval()


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
        keys = ("run", "network", "weights", "epoch", "test_accuracy", "data", "parameters", "image_size", "classes")
        print(*(f"{key:14}{model.card[key]}" for key in keys if key in model.card), sep="\n")
        return
    import numpy as np
    from PIL import Image, ImageOps

    side = model.image_size
    for file in files:
        try:
            image: Image.Image = Image.open(file)
            kind = image.format
            with suppress(Exception):  # damaged EXIF data, which many photographs have
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # grey of 16 bits, of which `convert` would make all above 255 white
                grey = np.asarray(image).astype(np.int32)
                image = Image.fromarray((grey >> 8 if kind == "PNG" else (grey + 128) // 257).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        except Exception as error:  # PIL has many
            sys.exit(f"{file}: {error}")
        with torch.no_grad():
            shares = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).softmax(1)[0]
        best = int(shares.argmax())
        print(f"{file}: {model.classes[best]} ({100 * float(shares[best]):.1f}%)")


if __name__ == "__main__":
    main(sys.argv[1:])
