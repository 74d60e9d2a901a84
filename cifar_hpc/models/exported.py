"""Reading a model back from the safetensors file that `python -m cifar_hpc export` has written."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from cifar_hpc.config.fields import build
from cifar_hpc.config.spec import BUILT_IN, ModelSpec, Spec
from cifar_hpc.config.validate import check
from cifar_hpc.errors import SpecError
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.models.standalone import Model, assemble
from cifar_hpc.text import one_line


def load_exported(file: str | Path) -> Model:
    """Load an exported model on the CPU. Of a network's own code only torchvision's is run.

    Raises:
        FileNotFoundError: there is no such file.
        SpecError: it is no exported model, or of a network that is not part of this project or of torchvision.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            card = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        network = card.get("network", BUILT_IN)  # version 0.1.0 exported no other
        if network.startswith("torchvision.models:"):
            make: Any = getattr(importlib.import_module("torchvision.models"), network.partition(":")[2])
            return assemble(make(**json.loads(card["arguments"])), card, weights)
        if network == BUILT_IN:
            spec = check(Spec(model=build(ModelSpec, json.loads(card["model"]), "model"))).model
            if sum(spec.blocks) > len(weights):
                raise ValueError(f"its tensors are too few for {sum(spec.blocks)} blocks")
            classes = len(json.loads(card["classes"]))
            with torch.device("meta"):  # takes no memory before the shapes are known to fit
                empty = ImprovedResNet(spec, classes)
            for name, own in empty.state_dict().items():
                if weights.get(name, own).dtype != own.dtype:
                    raise ValueError(f"{name} is {weights[name].dtype}")
            empty.load_state_dict(weights, assign=True)
            return assemble(ImprovedResNet(spec, classes), card, weights)
    except (SafetensorError, SpecError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        words = one_line(f"{type(error).__name__}: {error}")[:300]
        raise SpecError(f"{file}: is not what `python -m cifar_hpc export` writes ({words}).") from None
    raise SpecError(
        f"{file}: its network, {one_line(network)[:200]}, is code of its own. HINT: `from model import load`, beside "
        "it, runs that code."
    )
