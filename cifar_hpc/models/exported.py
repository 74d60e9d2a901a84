"""Exported models: read back from the safetensors file that `python -m cifar_hpc export` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_hpc.config.fields import build
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.models.improved_resnet import ImprovedResNet


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
        self.classes: list[str] = json.loads(card["classes"])
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
        SpecError: its card names a network that this version does not know.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        card: dict[str, Any] = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    network = ImprovedResNet(build(ModelSpec, json.loads(card["model"]), "model"))
    network.load_state_dict(weights)
    return ExportedModel(network.to(memory_format=torch.channels_last), card).eval()
