"""cifar_hpc: preemptible CIFAR-10 training on Slurm that ends in the same bits whatever happens on the way."""

from __future__ import annotations

TYPE_CHECKING = False  # of `typing`, which takes longer to import than all else here
if TYPE_CHECKING:
    from cifar_hpc.models.improved_resnet import ExportedModel

__version__ = "0.1.0"


def load(file: str) -> ExportedModel:
    """Load a model that `python -m cifar_hpc export` has written; see `models.improved_resnet.load_exported`."""
    from cifar_hpc.models.improved_resnet import load_exported  # torch is loaded only here

    return load_exported(file)
