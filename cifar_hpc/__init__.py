"""cifar_hpc: preemptible CIFAR-10 training on Slurm that ends in the same bits whatever happens on the way."""

from __future__ import annotations

TYPE_CHECKING = False  # of `typing`, which takes longer to import than all else here
if TYPE_CHECKING:
    from cifar_hpc.models.standalone import Model

__version__ = "0.3.0"


def load(file: str) -> Model:
    """Load a model that `python -m cifar_hpc export` has written; see `models.exported.load_exported`."""
    from cifar_hpc.models.exported import load_exported  # torch is loaded only here

    return load_exported(file)
