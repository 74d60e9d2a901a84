"""The training state, and the file that holds it.

A checkpoint file is one dict of tensors and plain values, written by torch.save and readable with weights_only=True.
Its keys are the fields of `TrainingState`, and `format`, the version of this layout.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.errors import RunFailedError
from cifar_hpc.tensorfile import BadFileError

FORMAT = 1


@dataclass(kw_only=True)
class TrainingState:
    """The whole state of a run at a step boundary.

    Attributes:
        spec: the frozen spec, as nested plain values.
        epoch, step_in_epoch, step: epochs completed, steps in this epoch, steps in all.
        updates: of the weights, without the steps that GradScaler skipped.
        epoch_seconds: training time of this epoch so far, over all attempts.
        best: epoch and test_accuracy of the best epoch.
        model: fast weights, by parameter name.
        buffers: BatchNorm buffers that belong to the fast weights.
        optimizer: Lookahead's state (slow weights, counter, inner state), or the plain optimizer's.
        scaler: GradScaler's state; empty unless fp16.
        average: the averaged weights, in the model's order; None without ema.decay, and then no key of the file.
        slow_buffers: BatchNorm statistics of the epoch's evaluation; None in the middle of an epoch.
        sums: float64 [shards, 2]: this epoch's summed loss and correct predictions of each shard.
        history: the rows of metrics.jsonl so far, as JSON lines.
        environment: hardware, libraries and data that the bits depend on.
        digest: sha256 over all of the above; empty until the state is in a file.
    """

    spec: dict[str, Any]
    epoch: int
    step_in_epoch: int
    step: int
    epoch_seconds: float
    best: dict[str, Any]
    model: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    updates: int
    average: list[Tensor] | None = None
    slow_buffers: dict[str, Tensor] | None
    sums: Tensor
    history: str
    environment: dict[str, Any]
    digest: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to this state."""
        return [json.loads(line) for line in self.history.splitlines()]

    def digests(self) -> dict[str, str | None]:
        """Return the sha256 of fast, slow and averaged weights, momentum and BatchNorm buffers, to compare two runs."""
        inner = self.optimizer.get("inner", self.optimizer)
        momentum = [entry.get("momentum_buffer") for _, entry in sorted(inner["state"].items())]
        return {
            "fast_weights": tensorfile.digest(self.model),
            "slow_weights": tensorfile.digest(self.optimizer["slow"]) if "slow" in self.optimizer else None,
            **({"averaged_weights": tensorfile.digest(self.average)} if self.average is not None else {}),
            "momentum": tensorfile.digest(momentum),
            "bn_buffers": tensorfile.digest(self.buffers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint file, with its digest."""
        content = {"format": FORMAT, **vars(self)}
        if self.average is None:
            del content["average"]
        return tensorfile.seal(content)


REQUIRED = ("format", *(field.name for field in fields(TrainingState) if field.name != "average"))


def read_checkpoint(path: Path) -> TrainingState:
    """Read and verify a checkpoint.

    Raises:
        BadFileError: the file is damaged or foreign.
        RunFailedError: reading it is not permitted, or its format version is another one; it is not damaged.
        OSError, MemoryError: it cannot be read at the moment.
    """
    try:
        content = tensorfile.load(path)
    except PermissionError as error:
        raise RunFailedError(
            f"{path}: cannot be read: {error.strerror}. HINT: see who owns it (ls -l), and train as that user."
        ) from None
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int:
        raise BadFileError("not a checkpoint of cifar_hpc")
    if version != FORMAT:
        writer = "a newer" if version > FORMAT else "an older"
        raise RunFailedError(
            f"{path}: is of format version {version}, written by {writer} cifar_hpc; this one reads version {FORMAT}. "
            f"HINT: continue with the cifar_hpc that wrote it, or start a new run under another --name."
        )
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise BadFileError(f"incomplete: {', '.join(missing)} missing")
    tensorfile.check_seal(content)
    return TrainingState(**{field.name: content.get(field.name) for field in fields(TrainingState)})


_page_locked = True  # until this process is refused such memory


def to_host(value: Any, warn: Callable[[str], object] = print) -> Any:
    """Copy a tree to host memory. The copy shares no tensor with the original.

    From a GPU all tensors are copied at once to page-locked memory, which PyTorch reuses, with a single wait. Where
    that memory is refused, `warn` is called once, and ordinary memory is used.
    """
    global _page_locked
    try:
        copy = _copy(value)
    except RuntimeError as error:
        if not _page_locked:
            raise
        _page_locked = False
        reason = str(error).partition("\n")[0]
        warn(f"no page-locked memory, so copies for checkpoints take longer: {reason}. HINT: ulimit -l; free memory")
        copy = _copy(value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return torch.empty_like(value, device="cpu", pin_memory=_page_locked).copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(v) for v in value]
    return value
