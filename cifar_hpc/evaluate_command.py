"""python -m cifar_hpc evaluate: how good a run's model is, class by class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cifar_hpc.confusion import Matrix, class_accuracy, confusion, draw, most_confused, table
from cifar_hpc.evaluation import BATCH
from cifar_hpc.inference import batches
from cifar_hpc.labelled_images import LabelledImages, other_images, own_images
from cifar_hpc.output_path import output_folder
from cifar_hpc.paths import project_root
from cifar_hpc.printable import printable
from cifar_hpc.trained_model import TrainedModel, load_trained, noted


@dataclass(frozen=True)
class Figures:
    """Accuracy in %, mean loss (label smoothing as in training), and the confusion matrix."""

    accuracy: float
    loss: float
    matrix: Matrix


def evaluate(run: str, data: str | None, weights: str, out: str | None, *, as_json: bool) -> int:
    """Measure a run's model on its test images, or on those in `data`, and print what comes out.

    With `as_json`, one object:

        run, file, step, epoch     which model; run is null for a file that lies in no run's folder
        weights                    averaged | slow | fast
        data, images               what was measured on, and how many images that is
        accuracy, loss             in %, and the mean with the run's label smoothing
        logged                     {"epoch", "test_accuracy", "test_loss"} of the run's own evaluation of this model on
                                   these images; null where there was none
        classes                    ten of {"label", "name", "images", "correct", "accuracy"}; the last is null where
                                   there is no image
        confusion                  ten rows, one a true class, of ten counts, one a predicted class
        device, amp                where and in what precision it was computed
        figures, notes             files written for --out; sentences that a user should know

    Raises:
        UserError: names the run, file or folder that is not what it should be.
    """
    root = project_root()
    folder = output_folder(out) if out is not None else None
    trained = load_trained(root, run, weights)
    spec = trained.spec.data
    images = own_images(spec, root) if data is None else other_images(Path(data).expanduser(), spec, root)
    figures = measure(trained, images)
    logged = _logged(trained.logged) if data is None else None
    files: list[Path] = []
    if folder is not None:
        name, share = trained.run or trained.path.name, f"{figures.accuracy:.2f}% of {len(images.labels):,} images"
        title = f"{name}, epoch {trained.state['epoch']}: {share}"
        files = draw(figures.matrix, images.classes, title, folder)
    if as_json:
        print(json.dumps(_report(trained, images, figures, logged, files), indent=1))
    else:
        print(printable("\n".join(_lines(trained.facts(root), trained, images, figures, logged, files))))
    return 0


def measure(trained: TrainedModel, data: LabelledImages) -> Figures:
    """Evaluate as the trainer does: the same batches, summed in the same order, so the figures have the same bits."""
    count, smoothing = len(data.labels), trained.spec.train.label_smoothing
    sums = torch.zeros(-(-count // BATCH), 2, dtype=torch.float64)
    predicted = torch.empty(count, dtype=torch.int64)
    labels = data.labels.to(trained.device)
    for first, logits in batches(trained, lambda first, last: data.images[first:last], count, "evaluating"):
        part = labels[first : first + BATCH]
        found = logits.argmax(1)
        sums[first // BATCH, 0] = F.cross_entropy(logits, part, label_smoothing=smoothing, reduction="sum").cpu()
        sums[first // BATCH, 1] = (found == part).sum().cpu()
        predicted[first : first + BATCH] = found.cpu()
    loss, correct = (float(value) for value in sums.sum(0))
    return Figures(100 * correct / count, loss / count, confusion(data.labels, predicted))


def _logged(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    keys = ("epoch", "test_accuracy", "test_loss")
    if row is None or not all(isinstance(row.get(key), (int, float)) for key in keys):
        return None
    return {key: row[key] for key in keys}


def _report(
    trained: TrainedModel, data: LabelledImages, figures: Figures, logged: dict[str, Any] | None, files: list[Path]
) -> dict[str, Any]:
    return {
        "run": trained.run,
        "file": str(trained.path),
        "step": trained.state["step"],
        "epoch": trained.state["epoch"],
        "weights": trained.weights,
        "data": data.source,
        "images": len(data.labels),
        "accuracy": figures.accuracy,
        "loss": figures.loss,
        "logged": logged,
        "classes": [
            {
                "label": label,
                "name": name,
                "images": sum(figures.matrix[label]),
                "correct": figures.matrix[label][label],
                "accuracy": class_accuracy(figures.matrix, label),
            }
            for label, name in enumerate(data.classes)
        ],
        "confusion": figures.matrix,
        "device": trained.device.type,
        "amp": trained.amp,
        "figures": [str(path) for path in files],
        "notes": [*trained.notes, *data.notes],
    }


def _lines(
    facts: Mapping[str, str],
    trained: TrainedModel,
    data: LabelledImages,
    figures: Figures,
    logged: dict[str, Any] | None,
    files: list[Path],
) -> list[str]:
    smoothing = trained.spec.train.label_smoothing
    said = {
        **facts,
        "images": f"{len(data.labels):,} test images, {data.source}",
        "accuracy": f"{figures.accuracy:.2f}%{_beside(figures.accuracy, logged, 'test_accuracy', '.2f', '%')}",
        "loss": f"{figures.loss:.4f}{_beside(figures.loss, logged, 'test_loss', '.4f', '')}"
        + (f", with label smoothing {smoothing:g}" if smoothing else ""),
    }
    lines = [f"{key:11} {value}" for key, value in said.items()]
    lines += ["", *table(figures.matrix, data.classes), ""]
    lines += most_confused(figures.matrix, data.classes)
    lines += noted((*trained.notes, *data.notes))
    return lines + [f"wrote {path}" for path in files]


def _beside(value: float, logged: Mapping[str, Any] | None, key: str, form: str, unit: str) -> str:
    if logged is None:
        return ""
    if value == logged[key]:
        return f" (the same as logged after epoch {logged['epoch']})"
    return f" (logged after epoch {logged['epoch']}: {logged[key]:{form}}{unit})"
