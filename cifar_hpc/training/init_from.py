"""Fine-tuning: a new run begins with the weights of a trained model, as far as names and shapes fit."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.files import read_regular
from cifar_hpc.models.network import parts
from cifar_hpc.models.standalone import read
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import one_line
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.evaluation import evaluated_kind

_LISTED = 5  # tensors that the log names


def init_from(engine: Engine, spec: ModelSpec, log: Callable[[str], object]) -> None:
    """Copy the weights of model.init_from into a network that has not been trained yet, and begin averages there.

    Args:
        log: called with lines on what fits and what does not.

    Raises:
        RunFailedError: the file is not the one of the submission, is no model, or nothing of it fits.
    """
    assert spec.init_from is not None
    path = Path(spec.init_from)
    try:
        if hashlib.sha256(read_regular(path)).hexdigest()[:16] != spec.init_digest:
            raise RunFailedError(f"model.init_from: {path} is another file now than at submission. HINT: submit again.")
        theirs = read(path)[1] if path.suffix == ".safetensors" else evaluated_parts(read_checkpoint(path))
    except (OSError, BadFileError, SpecError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RunFailedError(f"model.init_from: {path}: {one_line(str(error))[:500]}") from None
    own = parts(engine.model)
    other = [
        f"{name}: {list(theirs[name].shape) if name in theirs else 'nothing'} there, {list(mine.shape)} here"
        for name, mine in own.items()
        if name not in theirs or theirs[name].shape != mine.shape
    ]
    unused = [name for name in theirs if name not in own]
    if len(other) == len(own):
        raise RunFailedError(
            f"model.init_from: {path}: none of its {len(theirs)} tensors has name and shape of one of the network's "
            f"{len(own)}. HINT: is it of another network? {'; '.join(other[:2])}"
        )
    with torch.no_grad():
        for name, mine in own.items():
            if name in theirs and theirs[name].shape == mine.shape:
                mine.copy_(theirs[name])
    engine.restart_averages()
    log(f"initialised from {path}: {len(own) - len(other)} of {len(own)} tensors")
    for words, names in (("as at the start of any run", other), ("unused", unused)):
        for name in names[:_LISTED]:
            log(f"  {name}: {words}" if words == "unused" else f"  {name}; {words}")
        if len(names) > _LISTED:
            log(f"  and {len(names) - _LISTED} more: {words}")


def evaluated_parts(state: TrainingState) -> dict[str, Tensor]:
    """Return the weights that a run evaluates, with their BatchNorm statistics, by name."""
    kind = evaluated_kind(from_plain(state.spec))
    return {**state.weights(kind), **(state.slow_buffers or state.buffers)}
