"""What a checkpoint holds, and how one is read, verified and named by its sums.

A checkpoint is one dict of tensors and plain values, written by torch.save and readable with weights_only=True:

    format        version of this layout
    spec          the frozen spec, as nested plain values
    step, epoch, step_in_epoch, updates      the position: steps done, epochs completed, steps in this epoch, updates
    model         fast weights, by parameter name
    buffers       BatchNorm buffers that go with the fast weights
    slow_buffers  BatchNorm statistics re-estimated for the slow weights, or None in the middle of an epoch
    optimizer     Lookahead's state (slow weights, counter, inner state), or the plain optimizer's
    scaler        GradScaler's state; empty unless fp16
    sums          float64 [shards, 2]: this epoch's summed loss and correct predictions of each shard
    epoch_seconds, history (metrics rows so far, as JSON lines), best, environment
    digest        sha256 over all of the above
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc.errors import RunFailedError

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


class BadCheckpointError(Exception):
    """The file is no checkpoint that can be used; the message says why."""


def digest(value: Any) -> str:
    """sha256 of a tree of dicts, lists, plain values and tensors: of what it means, not of how it lies in memory."""
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()


def _update(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        sha.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=str):
            sha.update(f"{key!r}:".encode())
            _update(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"list {len(value)};".encode())
        for item in value:
            _update(sha, item)
    else:
        sha.update(f"{value!r};".encode())


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """Add the digest that `read` verifies."""
    state["digest"] = digest({k: v for k, v in state.items() if k != "digest"})
    return state


def read(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises:
        BadCheckpointError: for a file that is damaged or foreign.
        RunFailedError: for a file of another format version, which is not damaged.
        OSError: where it cannot be read just now.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadCheckpointError(f"not readable ({type(error).__name__})") from None
    except (OSError, MemoryError):
        raise  # says nothing about the file; trying again may help
    except Exception as error:  # torch.load fails in many ways on a damaged file
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n")[0][:120]
        raise BadCheckpointError(f"not readable ({type(error).__name__}: {words})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise BadCheckpointError("not a checkpoint of cifar_hpc")
    if state["format"] != FORMAT:
        raise RunFailedError(
            f"{path}: format version {state['format']}, but this code reads version {FORMAT}. "
            "HINT: use the cifar_hpc that wrote it, or begin the run anew under another --name."
        )
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise BadCheckpointError(f"incomplete: {', '.join(missing)} missing")
    if state["digest"] != digest({k: v for k, v in state.items() if k != "digest"}):
        raise BadCheckpointError("its content does not match its digest: damaged")
    return state


def to_host(value: Any) -> Any:
    """A copy of a tree whose tensors lie in host memory and share nothing with the training state."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: to_host(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_host(v) for v in value]
    return value


def sums(state: Mapping[str, Any]) -> dict[str, str | None]:
    """sha256 of the fast weights, slow weights, momentum and BatchNorm buffers: how anyone checks the promise."""
    optimizer = state["optimizer"]
    inner = optimizer.get("inner", optimizer)
    momentum = [entry.get("momentum_buffer") for _, entry in sorted(inner["state"].items())]
    return {
        "fast_weights": digest(state["model"]),
        "slow_weights": digest(optimizer["slow"]) if "slow" in optimizer else None,
        "momentum": digest(momentum),
        "bn_buffers": digest(state["buffers"]),
    }


def history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to the checkpoint."""
    return [json.loads(line) for line in state["history"].splitlines()]
