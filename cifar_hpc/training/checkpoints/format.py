"""What a checkpoint holds, and how one is read, verified and named by its sums.

A checkpoint is one dict of tensors and plain values, written by torch.save and readable with weights_only=True:

    format        version of this layout
    spec          the frozen spec, as nested plain values
    step, epoch, step_in_epoch, updates      the position: steps done, epochs completed, steps in this epoch, updates
    model         fast weights, by parameter name
    buffers       BatchNorm buffers that go with the fast weights
    slow_buffers  BatchNorm statistics that the epoch was evaluated with, or None in the middle of an epoch
    optimizer     Lookahead's state (slow weights, counter, inner state), or the plain optimizer's
    average       the averaged weights, in the model's order; only where ema.decay is set
    scaler        GradScaler's state; empty unless fp16
    sums          float64 [shards, 2]: this epoch's summed loss and correct predictions of each shard
    epoch_seconds, history (metrics rows so far, as JSON lines), best, environment
    digest        sha256 over all of the above
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.errors import RunFailedError
from cifar_hpc.tensorfile import BadFileError as BadCheckpointError
from cifar_hpc.tensorfile import digest

FORMAT = 1
REQUIRED = (
    "format",
    "spec",
    "step",
    "epoch",
    "step_in_epoch",
    "updates",
    "model",
    "buffers",
    "slow_buffers",
    "optimizer",
    "scaler",
    "sums",
    "epoch_seconds",
    "history",
    "best",
    "environment",
    "digest",
)


def read(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises:
        BadCheckpointError: for a file that is damaged or foreign.
        RunFailedError: for a file that may not be read, or of another format version; neither is damaged.
        OSError, MemoryError: where it cannot be read just now.
    """
    try:
        state = tensorfile.load(path)
    except PermissionError as error:
        raise RunFailedError(
            f"{path}: cannot be read: {error.strerror}. HINT: see to whom it belongs (ls -l), and train as that user."
        ) from None
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int:
        raise BadCheckpointError("not a checkpoint of cifar_hpc")
    if version != FORMAT:
        writer = "a newer" if version > FORMAT else "an older"
        raise RunFailedError(
            f"{path}: is of format version {version}, written by {writer} cifar_hpc; this one reads version {FORMAT}. "
            f"HINT: go on with the cifar_hpc that wrote it, or begin the run anew under another --name."
        )
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise BadCheckpointError(f"incomplete: {', '.join(missing)} missing")
    tensorfile.check_seal(state)
    return state  # type: ignore[no-any-return]


def to_host(value: Any) -> Any:
    """A copy of a tree whose tensors lie in host memory and share nothing with the training state.

    From a GPU all are copied at once to page-locked memory, which PyTorch keeps for the next time, and waited for once.
    """
    copy = _copy(value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(v) for v in value]
    return value


def sums(state: Mapping[str, Any]) -> dict[str, str | None]:
    """sha256 of the fast, slow and averaged weights, momentum and BatchNorm buffers: how anyone checks the promise."""
    optimizer = state["optimizer"]
    inner = optimizer.get("inner", optimizer)
    momentum = [entry.get("momentum_buffer") for _, entry in sorted(inner["state"].items())]
    return {
        "fast_weights": digest(state["model"]),
        "slow_weights": digest(optimizer["slow"]) if "slow" in optimizer else None,
        **({"averaged_weights": digest(state["average"])} if "average" in state else {}),
        "momentum": digest(momentum),
        "bn_buffers": digest(state["buffers"]),
    }


def history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to the checkpoint."""
    return [json.loads(line) for line in state["history"].splitlines()]
