"""The training state, and the file that holds it.

A checkpoint file is one dict of tensors and plain values, written by torch.save and readable with weights_only=True.
Its keys are the fields of `TrainingState`, and `format`, the version of this layout. A digest proves that a file is
unchanged, and not that a run wrote it: names, shapes, types and numbers are compared with those that its spec gives.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from cifar_hpc import tensorfile
from cifar_hpc.config.io import from_plain, to_plain
from cifar_hpc.config.spec import CLASSES, Spec
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import RunFailedError, SpecError, UnknownKeyError
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import shown
from cifar_hpc.training.optim import build_optimizer

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
        dataset: the fields of its `DatasetInfo`; None in files of versions that knew ten classes of 32x32 pixels alone.
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
    dataset: dict[str, Any] | None = None
    digest: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to this state."""
        return [json.loads(line) for line in self.history.splitlines()]

    @property
    def info(self) -> DatasetInfo | None:
        """Facts of the images that the run trains on; None where the file does not have them."""
        if self.dataset is None:
            return None
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.dataset.items()}
        return DatasetInfo(**known)

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Return the fast, slow or averaged weights by parameter name."""
        found = {"fast": self.model.values(), "slow": self.optimizer.get("slow"), "averaged": self.average}[kind]
        return dict(zip(self.model, found or (), strict=True))

    def digests(self) -> dict[str, str | None]:
        """Return the sha256 of fast, slow and averaged weights, the optimizer's moments and BatchNorm buffers."""
        entries = [entry for _, entry in sorted(self.optimizer.get("inner", self.optimizer)["state"].items())]
        adam = self.spec["optimizer"]["name"] == "adamw"
        moments = {key: key for key in ("exp_avg", "exp_avg_sq")} if adam else {"momentum": "momentum_buffer"}
        return {
            "fast_weights": tensorfile.digest(self.model),
            "slow_weights": tensorfile.digest(self.optimizer["slow"]) if "slow" in self.optimizer else None,
            **({"averaged_weights": tensorfile.digest(self.average)} if self.average is not None else {}),
            **{key: tensorfile.digest([entry.get(name) for entry in entries]) for key, name in moments.items()},
            "bn_buffers": tensorfile.digest(self.buffers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint file, with its digest."""
        content = {"format": FORMAT, **vars(self)}
        for key in (key for key in _OPTIONAL if content[key] is None):
            del content[key]
        return tensorfile.seal(content)


_OPTIONAL = ("average", "dataset")  # fields that a file has only where they have a value
REQUIRED = ("format", *(field.name for field in fields(TrainingState) if field.name not in _OPTIONAL))


def read_checkpoint(path: Path) -> TrainingState:
    """Read and verify a checkpoint.

    Raises:
        BadFileError: the file is damaged or foreign; the message names the field.
        RunFailedError: reading it is not permitted, or another version wrote it; it is not damaged.
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
    try:
        spec = from_plain(content["spec"])
    except UnknownKeyError as error:
        words = str(error)[:1000]
        raise RunFailedError(f"{path}: its spec: {words} HINT: did a newer cifar_hpc write it?") from None
    except (SpecError, TypeError, ValueError) as error:
        raise BadFileError(f"its spec: {error}"[:1000]) from None
    _check_position(content)
    _check_parts(content, spec)
    content["spec"] = to_plain(spec)
    return TrainingState(**{field.name: content.get(field.name) for field in fields(TrainingState)})


def _check_position(content: Mapping[str, Any]) -> None:
    """Check the plain values but the spec's, and that they agree with one another."""
    numbers = {"epoch": int, "step_in_epoch": int, "step": int, "updates": int, "epoch_seconds": float, "history": str}
    for key, form in {**numbers, "best": {"epoch": int, "test_accuracy": float}}.items():
        _check(content[key], form, key)
    epoch, within, step = content["epoch"], content["step_in_epoch"], content["step"]
    environment = content["environment"]
    try:
        rows = [json.loads(line) for line in content["history"].splitlines()]
        ends = [(row["epoch"], row["step"]) for row in rows]
        long = len(json.dumps(environment)) > 100_000  # plain values, of whatever version
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadFileError(f"history or environment: not what a run writes ({type(error).__name__})") from None
    each = ends[0][1] if ends else within
    whole = all(type(number) is int for end in ends for number in end)
    for key, good in {
        "history": whole and ends == [(n, n * each) for n in range(1, len(ends) + 1)],
        "epoch": epoch == len(ends),
        "step_in_epoch": whole and within <= each,
        "step": whole and step == epoch * each + within,
        "updates": content["updates"] <= step,
        "best": content["best"]["epoch"] <= epoch,
    }.items():
        if not good:
            raise BadFileError(f"{key}: {shown(content[key])} does not go with the other fields")
    if not isinstance(environment, dict) or long or not {"amp", "cuda", "device", "torch"} <= environment.keys():
        raise BadFileError("environment: is not a short mapping with amp, cuda, device and torch")
    if environment["amp"] not in ("fp32", "bf16", "fp16"):
        raise BadFileError(f"environment.amp: {shown(environment['amp'])} is not allowed; allowed: fp32, bf16, fp16")


# Keys of a group of parameters that each version of torch has.
_GROUP = ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps")


def _check_parts(content: Mapping[str, Any], spec: Spec) -> None:
    """Check names, shapes and types against the model and the optimizer that the spec builds, in no memory."""
    _check_dataset(content.get("dataset"))
    weights, buffers = _form_of(content, spec)
    optimizer = build_optimizer(nn.ParameterList(weights.values()), spec).state_dict()
    inner = optimizer.get("inner", optimizer)
    if content["updates"]:
        inner["state"] = _moments(content, spec, list(weights.values()))
    group = inner["param_groups"][0]
    group |= {"lr": float, ...: "other versions of torch have more keys or fewer"}
    group |= {"betas": list(group["betas"])} if "betas" in group else {}
    if "counter" in optimizer:
        optimizer["counter"] = content["updates"]
    scaler = {"scale": float, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    for key, form in {
        "model": weights,
        "buffers": buffers,
        "optimizer": optimizer,
        "scaler": {**scaler, "_growth_tracker": int} if content["scaler"] != {} else {},
        "average": None if spec.ema.decay is None else list(weights.values()),
        "slow_buffers": None if content["slow_buffers"] is None else buffers,
        "sums": torch.empty(spec.train.shards or 1, 2, dtype=torch.float64, device="meta"),
    }.items():
        _check(content.get(key), form, key)
    if list(content["model"]) != list(weights):  # slow and averaged weights are lists in this order
        raise BadFileError("model: its weights are not in the order of the network's")


def _moments(content: Mapping[str, Any], spec: Spec, weights: list[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return the form of the optimizer's state by parameter."""
    numbers: Iterable[int] = range(len(weights))
    if spec.model.target is not None:  # its frozen parameters have none
        found = content["optimizer"]
        found = found.get("inner", found).get("state") if isinstance(found, dict) else None
        numbers = [number for number in numbers if isinstance(found, dict) and number in found]
    if spec.optimizer.name == "adamw":
        step = torch.empty((), device="meta")
        return {n: {"step": step, "exp_avg": weights[n], "exp_avg_sq": weights[n]} for n in numbers}
    return {n: {"momentum_buffer": weights[n]} for n in numbers} if spec.optimizer.momentum else {}


def _form_of(content: Mapping[str, Any], spec: Spec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and buffers that a file has to have, without their values.

    The user's own network has yet to be built when a file is read: here a file has to be consistent in itself, and
    `Engine.load` compares it with the network.
    """
    found = [content["model"], content["buffers"]]
    if spec.model.target is None:
        if not isinstance(found[0], dict) or sum(spec.model.blocks) > len(found[0]):
            raise BadFileError("model: is not that of the spec")
        classes = len(content["dataset"]["classes"]) if content.get("dataset") else CLASSES
        with torch.device("meta"):
            model = ImprovedResNet(spec.model, classes)
        return dict(model.named_parameters()), dict(model.named_buffers())
    for key, part in zip(("model", "buffers"), found, strict=True):
        if not isinstance(part, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items()):
            raise BadFileError(f"{key}: is not a mapping of names to tensors")
    weights, buffers = ({k: torch.empty_like(v, device="meta") for k, v in part.items()} for part in found)
    return weights, buffers


def _check_dataset(value: Any) -> None:
    """Check the facts of the images, from which the network and its input follow."""
    if value is None:
        return
    counts = {"classes": range(1, 100_000), "mean": (3,), "std": (3,)}
    good = isinstance(value, dict) and value.keys() == {"image_size", *counts}
    if not good or not all(isinstance(value[k], list) and len(value[k]) in count for k, count in counts.items()):
        raise BadFileError("dataset: is not a mapping with classes, image_size, mean and std")
    for key, form in {"classes": str, "mean": float, "std": float}.items():
        for number, part in enumerate(value[key]):
            _check(part, form, f"dataset.{key}.{number}")
    _check(value["image_size"], int, "dataset.image_size")
    if value["image_size"] < 1 or min(value["std"]) <= 0:
        raise BadFileError("dataset: image_size or std is not above 0")


def _check(value: Any, form: Any, where: str) -> None:
    """Check a value against the form it has to have.

    Args:
        form: a mapping (with the key `...`, of these keys and others) or list of forms; a tensor, for its shape and
            type; int (from 0), float (finite) or str; or the very value.

    Raises:
        BadFileError: names the field.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        for key in (*form, *value):
            if (key not in form or key not in value) and (... not in form or key in _GROUP):
                raise BadFileError(f"{where}: {shown(key)} is {'missing' if key in form else 'foreign'}")
        for key in (key for key in form if key in value):
            _check(value[key], form[key], f"{where}.{key}")
        return
    if isinstance(form, list) and isinstance(value, list) and len(value) == len(form):
        for number, part in enumerate(form):
            _check(value[number], part, f"{where}.{number}")
        return
    if isinstance(form, Tensor):
        good = isinstance(value, Tensor) and (value.shape, value.dtype) == (form.shape, form.dtype)
    elif form in (int, float):
        good = type(value) in (int, form) and abs(value) < math.inf and (form is float or 0 <= value < 2**53)
    else:
        good = isinstance(value, form if form is str else (bool, int, float, str, NoneType)) and form in (str, value)
    if not good:
        raise BadFileError(f"{where}: {_in_words(value)} is not allowed; allowed: {_in_words(form)}")


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, type):
        return {int: "an integer from 0", float: "a number", str: "text"}[value]
    return f"a list of {len(value)}" if isinstance(value, list) else shown(value)


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
