"""Images from the user's own function, data.target: called, and its answer checked."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cifar_hpc.config import user_code
from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.text import shown

if TYPE_CHECKING:
    from cifar_hpc.data.datasets import Dataset

KEYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


def load_target(data: DataSpec, root: Path, folder: Path | None) -> Dataset:
    """Call data.target, on each rank at each start, and check what it returns.

    Args:
        folder: of the copies of the user's files.

    Raises:
        RunFailedError: the function fails; shows the line of the user's file.
        SpecError: it returns something else than images, labels and names of classes.
    """
    from cifar_hpc.data.datasets import Dataset

    assert data.target is not None
    folder = folder or Path("/")
    function, what = user_code.load(data.target, data.code, folder, "data.target"), f"data.target: {data.target}"
    offered = {"root": str(root / data.root), "image_size": data.size}
    try:
        taken = inspect.signature(function).parameters
        found = function(**{key: value for key, value in offered.items() if key in taken} | data.args)
    except (Exception, SystemExit) as error:  # the user's code raises anything
        raise RunFailedError(user_code.explain(error, folder, what)) from None
    values = dict(zip(KEYS, found, strict=False)) if isinstance(found, tuple) and len(found) == len(KEYS) else found
    if not isinstance(values, dict) or values.keys() != {*KEYS}:
        got = f"a dictionary of {', '.join(map(str, values))}" if isinstance(values, dict) else type(found).__name__
        got += f" of {len(found)}" if isinstance(found, tuple) else ""
        raise SpecError(
            f"{what}: returns {got}; allowed: a dictionary, or a tuple in this order, of {', '.join(KEYS)}."
        )
    classes = tuple(values["classes"]) if isinstance(values["classes"], (list, tuple)) else ()
    if len({*map(str, classes)}) < max(2, len(classes)) or not all(isinstance(name, str) for name in classes):
        raise SpecError(
            f"{what}: classes is {shown(str(values['classes'])[:100])}; allowed: a list of 2 or more names."
        )
    tensors: list[Any] = []
    for split in ("train", "test"):
        images = _images(values[f"{split}_images"], data.size, f"{what}: {split}_images")
        labels = _labels(values[f"{split}_labels"], len(images), len(classes), f"{what}: {split}_labels")
        tensors += [images, labels]
        if not len(images) and (split == "train" or data.holdout is None):
            raise SpecError(f"{what}: {split}_images holds no image. HINT: data.holdout=N tests on N training images.")
    return Dataset(*tensors, info=DatasetInfo(classes))


def _tensor(value: Any, where: str) -> Tensor:
    """A tensor on the CPU of what a user's function returned."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except Exception:  # numpy and torch have many
        raise SpecError(f"{where}: is {type(value).__name__}; allowed: an array of numpy, or a tensor.") from None


def _images(value: Any, size: int, where: str) -> Tensor:
    """uint8 [N, 3, size, size]."""
    images = _tensor(value, where)
    shape = list(images.shape)
    if images.dtype != torch.uint8:
        hint = "(255 * images).astype('uint8')" if images.dtype.is_floating_point else "images.astype('uint8')"
        raise SpecError(f"{where}: is {images.dtype}; allowed: uint8, from 0 to 255. HINT: return {hint}.")
    if images.ndim == 4 and shape[3] == 3 != shape[1]:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise SpecError(f"{where}: has the shape {shape}; allowed: [N, 3, S, S] or [N, S, S, 3], with any S.")
    if (side := images.shape[2]) != size:
        raise SpecError(f"{where}: {side}x{side} pixels; data.image_size says {size}. HINT: data.image_size={side}.")
    return images.contiguous()


def _labels(value: Any, count: int, classes: int, where: str) -> Tensor:
    """int64 [count], each below `classes`."""
    labels = _tensor(value, where)
    if labels.ndim != 1 or len(labels) != count:
        raise SpecError(f"{where}: has the shape {list(labels.shape)}; allowed: [{count}], a label for each image.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise SpecError(f"{where}: is {labels.dtype}; allowed: whole numbers.")
    labels = labels.to(torch.int64)
    low, high = (int(labels.min()), int(labels.max())) if count else (0, 0)
    if not 0 <= low <= high < classes:
        raise SpecError(f"{where}: from {low} to {high}; allowed: 0 to {classes - 1}, as there are {classes} classes.")
    return labels
