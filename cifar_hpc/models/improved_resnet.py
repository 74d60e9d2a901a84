"""ImprovedResNet: the report's bottleneck ResNet for 32x32 images, 4,903,082 parameters by default.

Two of its layers give the same result for any number of processes: BatchNorm by shard, dropout by key. Exported models
are read back from the safetensors file that `python -m cifar_hpc export` writes."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_hpc.config.fields import build
from cifar_hpc.config.spec import CLASSES, ModelSpec, Spec, check
from cifar_hpc.errors import SpecError
from cifar_hpc.randomness import Stream, mix
from cifar_hpc.text import one_line

EXPANSION = 4


class ShardBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of one logical shard.

    Every shard normalises with its own statistics; the running statistics follow the shards for which
    `update_statistics` is set (shard 0), so that they do not depend on how shards are dealt out to ranks.
    """

    update_statistics = True

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.update_statistics:
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(input)


class KeyedDropout(nn.Module):
    """Dropout whose masks are a function of a key, and not of the global random state.

    All dropout layers of a model draw from one generator in the order in which they run; `ImprovedResNet.set_key`
    seeds it before each forward pass. An element is dropped where its 16 random bits, as a number, are below
    `rate` * 2**16: four elements share a draw, since drawing one by one took a sixth of a training step on a CPU.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        if self.generator is None:
            raise RuntimeError("set_key must be called before a forward pass in training mode")
        count, dropped = input.numel(), round(self.rate * 2**16)
        draws = torch.empty(-(-count // 4), dtype=torch.int64, device=input.device)
        draws.random_(-(2**63), None, generator=self.generator)
        # In the input's order in memory, so that no pass over it jumps about.
        numbers = draws.view(torch.int16)[:count].as_strided(input.shape, input.stride())
        mask = (numbers >= dropped - 2**15).to(input.dtype)
        return input * mask.mul_(2**16 / (2**16 - dropped))


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 convolutions around a shortcut (He et al. 2016, arXiv:1512.03385, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int, activation: str, project: bool) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.conv1, self.bn1 = _conv(channels_in, width, 1), ShardBatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), ShardBatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, channels_out, 1), ShardBatchNorm2d(channels_out)
        layers = (_conv(channels_in, channels_out, 1, stride), ShardBatchNorm2d(channels_out)) if project else ()
        self.shortcut = nn.Sequential(*layers)  # without layers the identity
        self.activation = _activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(input)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.activation(x.add_(self.shortcut(input)))  # type: ignore[no-any-return]


class ImprovedResNet(nn.Module):
    """The report's network. Input [B, 3, 32, 32] float, output logits [B, 10].

    Attributes:
        norms: the BatchNorm layers in a fixed order.
    """

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
        self.norms = [m for m in self.modules() if isinstance(m, ShardBatchNorm2d)]
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
        for module in self.norms:
            module.update_statistics = update


def build_model(spec: ModelSpec, seed: int) -> ImprovedResNet:
    """The network on the CPU, its initial weights a function of `seed` alone (PyTorch's default initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(mix(seed, Stream.INIT))
        return ImprovedResNet(spec)


def assemble(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ImprovedResNet:
    """The network that has these tensors themselves as weights and buffers.

    Raises:
        ValueError, RuntimeError: they are not those of the network.
    """
    if sum(spec.blocks) > len(tensors):
        raise ValueError(f"its tensors are too few for {sum(spec.blocks)} blocks")
    with torch.device("meta"):  # takes no memory before the shapes are known to fit
        network = ImprovedResNet(spec)
    for name, own in network.state_dict().items():
        if tensors.get(name, own).dtype != own.dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}")
    network.load_state_dict(tensors, assign=True)
    return network


class ExportedModel(nn.Module):
    """A trained network with its normalisation, in evaluation mode.

    Attributes:
        card: the metadata of the file; docs/formats.md has its keys.
        classes: names of the classes, in the order of the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, card: dict[str, str]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.classes = [str(name) for name in json.loads(card["classes"])]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(json.loads(card[name])).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of `images`, uint8 [B, 3, 32, 32], RGB."""
        logits: Tensor = self.network((images / 255 - self.mean) / self.std)
        return logits


def load_exported(file: str | Path) -> ExportedModel:
    """Load an exported model on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        SpecError: it is no exported model, or of a network that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            card = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        network = assemble(check(Spec(model=build(ModelSpec, json.loads(card["model"]), "model"))).model, weights)
        exported = ExportedModel(network.to(memory_format=torch.channels_last), card)
    except (SafetensorError, SpecError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        words = one_line(f"{type(error).__name__}: {error}")[:300]
        raise SpecError(f"{file}: is not what `python -m cifar_hpc export` writes ({words}).") from None
    return exported.eval()


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


def _activation(name: str) -> nn.Module:
    return nn.LeakyReLU(inplace=True) if name == "leaky_relu" else nn.ReLU(inplace=True)
