"""Files that tests make: class folders of images, and checkpoints of runs that were never trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import blank_state
from PIL import Image

from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.training.checkpoints.format import TrainingState
from cifar_hpc.training.checkpoints.store import CheckpointStore

BEST_EPOCHS = (1, 3)  # of epochs of 10 steps


def state(step: int) -> TrainingState:
    """After `step` steps of a run whose epochs 1 and 3 are its best ones so far."""
    epoch = step // 10
    best = max((e for e in BEST_EPOCHS if e <= epoch), default=0)
    return blank_state(
        step,
        epoch,
        number=step,
        step_in_epoch=step % 10,
        best={"epoch": best, "test_accuracy": 10.0 * best},
    )


def save(folder: Path, *steps: int, keep: int = 9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = CheckpointStore(folder, keep, lambda event: None, pytest.fail)
    for step in steps:
        writer.save(state(step), best=step in [10 * e for e in BEST_EPOCHS])
        assert writer.wait() is None


def write_classes(folder: Path, names: tuple[str, ...]) -> torch.Tensor:
    """Two images of each synthetic class as PNG in folder/<class>/; returns them, uint8 [20, 3, 32, 32]."""
    _, _, images, labels = make_synthetic(100, 20)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / names[label] / f"{number:02d}.png")
    return images
