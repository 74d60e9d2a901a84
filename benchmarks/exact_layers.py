"""Exact layers beside PyTorch's own: dropout alone, and a training step of torchvision's ResNet-18 with dropout.

Both are timed in turn in one process on one thread; a step is forward, backward and SGD, without data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.measure import Row, alternate, quartiles, ratios, run_part
from cifar_hpc.models.exact import ExactLayers, make_exact

CPU = torch.device("cpu")
PLAIN, EXACT = "PyTorch's", "exact"


def measure(quick: bool) -> list[Row]:
    """Rows of the part "exact layers"."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        drop = nn.Sequential(nn.Dropout(0.2))
        images = torch.randn(128, 256, 32, 32).to(memory_format=torch.channels_last)
        network = resnet18(num_classes=10)
        network.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(512, 10))
        network = network.to(memory_format=torch.channels_last)
        batch = torch.randn(64, 3, 48, 48).to(memory_format=torch.channels_last)
        return [
            _row("dropout, float32 [128, 256, 32, 32]", drop, lambda model: model(images), 5 if quick else 20),
            _row("step of ResNet-18, 64 images of 48x48", network, _step(batch), 3 if quick else 15),
        ]
    finally:
        torch.set_num_threads(threads)


def _row(what: str, network: nn.Module, work: Callable[[nn.Module], object], repetitions: int) -> Row:
    exact = copy.deepcopy(network)
    layers: ExactLayers = make_exact(exact)

    def with_key() -> None:
        layers.set_key(1, CPU)
        work(exact)

    seconds = alternate({EXACT: with_key, PLAIN: lambda: work(network)}, repetitions, warm_up=2)
    ours, theirs = quartiles(seconds[EXACT]), quartiles(seconds[PLAIN])
    return Row("exact layers", what, "s", ours, PLAIN, theirs, ratios(seconds[PLAIN], seconds[EXACT]))


def _step(images: Tensor) -> Callable[[nn.Module], None]:
    labels = torch.arange(len(images)) % 10

    def step(network: nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        with torch.no_grad():
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-1e-4)

    return step


if __name__ == "__main__":
    run_part(measure, __doc__)
