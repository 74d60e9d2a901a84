"""python -m cifar_hpc evaluate: accuracy and confusion matrix of a run's model.

Runs the test images through a checkpoint, or others that have labels (--data).
Prints accuracy and loss, the accuracy of each class, and which classes are
taken for which (with more than ten, the number of images and the class that
most of the others were taken for); --out draws the confusion matrix.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.figures.style import new_figure, save_figure
from cifar_hpc.cli.parser import add_model_arguments
from cifar_hpc.cli.terminal import output_folder, shorten
from cifar_hpc.errors import SpecError
from cifar_hpc.files import expand_home
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths, project_root
from cifar_hpc.text import one_line, printable, shown

if TYPE_CHECKING:
    from torch import Tensor

    from cifar_hpc.data.datasets import LabelledImages
    from cifar_hpc.training.trained_model import TrainedModel

EXAMPLES = (
    "improved_resnet-1a2b3c4d",
    "checkpoints/improved_resnet-1a2b3c4d/best.pt --data ~/cifar-10 --json",
    "improved_resnet-1a2b3c4d --data mine.npz",
)

NAME_WIDTH, LONG_NAME = 12, 24
MOST_COLUMNS = 10  # classes of a matrix that fits 80 columns
Matrix = list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="DIR|FILE",
        help="other images: CIFAR's files, test/CLASS/*, CLASS/*, or a file with labels, as predict takes",
    )
    parser.add_argument("--out", metavar="DIR", help="draw the confusion matrix there, as PNG and SVG")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Measure a run's model on its test images, or on those of --data, and print the result.

    With --json, one object:

        run, file, step, epoch     which model; run is null for a file that lies in no run's folder
        weights                    averaged | slow | fast
        data, images               the images measured on, and their number
        accuracy, loss             in %, and the mean with the run's label smoothing
        logged                     {"epoch", "test_accuracy", "test_loss"} of the run's own evaluation of this model on
                                   these images; null where there was none
        classes                    of each class {"label", "name", "images", "correct", "accuracy"}; the last is null
                                   where there is no image
        confusion                  a row for each true class, of counts, one for each predicted class
        device, amp                where and in what precision it was computed
        figures, notes             files written for --out; sentences that a user should know

    Raises:
        UserError: names the run, file or folder that is wrong.
    """
    from cifar_hpc.data.datasets import other_images, own_images
    from cifar_hpc.training.trained_model import load_trained

    root, data = project_root(), arguments.data
    folder = output_folder(arguments.out) if arguments.out is not None else None
    trained = load_trained(root, arguments.run, arguments.weights)
    spec = trained.spec.data
    if data is None:
        frozen = read_frozen(RunPaths(root, trained.run)) if trained.run and spec.target else None
        if spec.target and (frozen is None or frozen.data != spec):  # code that a file names by itself is never run
            raise SpecError(
                f"{trained.path}: its images come from {shown(spec.target)}, which is run only for a checkpoint of a "
                "run whose logs/RUN/spec.yaml names it. HINT: --data."
            )
        images = own_images(spec, root, trained.code)
    else:
        images = other_images(Path(expand_home(data, "--data")), trained.info, resize=spec.image_size is not None)
    report = _report(trained, images, trained.logged if data is None else None)
    if folder is not None:
        name = trained.run or trained.path.name
        title = f"{name}, epoch {report['epoch']}: {report['accuracy']:.2f}% of {report['images']:,} images"
        report["figures"] = [str(path) for path in draw(report["confusion"], images.classes, title, folder)]
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(_text(report, trained, images.classes, root))
    return 0


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Matrix:
    """Counts of images by true class (row) and predicted class (column).

    Args:
        labels, predicted: int64 [N] of classes 0 to `classes` - 1.
    """
    matrix: Matrix = (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes).tolist()
    return matrix


def class_accuracy(matrix: Matrix, label: int) -> float | None:
    """Per cent of the class's images that were recognised; None where there is no image of it."""
    images = sum(matrix[label])
    return 100 * matrix[label][label] / images if images else None


def table(matrix: Matrix, names: Sequence[str]) -> list[str]:
    """Lines of at most 80 columns, as long as no count has more than four digits."""
    if len(matrix) > MOST_COLUMNS:
        return _list(matrix, names)
    width = 1 + max(4, *(len(str(count)) for row in matrix for count in row))
    head = "".join(f"{label:{width}}" for label in range(len(matrix)))
    lines = [f"{'':{NAME_WIDTH + 11}}predicted", f"{'true':{NAME_WIDTH + 2}} accuracy{head}"]
    for label, row in enumerate(matrix):
        accuracy = class_accuracy(matrix, label)
        share = _share(accuracy)
        counts = "".join(f"{count or '.':>{width}}" for count in row)
        lines.append(f"{label} {short(names[label]):{NAME_WIDTH}}{share:>9}{counts}")
    return lines


def _list(matrix: Matrix, names: Sequence[str]) -> list[str]:
    """A line for each class, in place of a matrix that no terminal shows."""
    width = len(str(len(matrix) - 1))
    lines = [f"{'class':{width + LONG_NAME + 1}}   images  accuracy  most often taken for"]
    for label, row in enumerate(matrix):
        count, other = max((count, -other) for other, count in enumerate(row) if other != label)
        wrong = f"{short(names[-other], LONG_NAME)} ({count})" if count else ""
        share = _share(class_accuracy(matrix, label))
        line = f"{label:<{width}} {short(names[label], LONG_NAME):{LONG_NAME}}{sum(row):>9}{share:>10}  {wrong}"
        lines.append(line.rstrip())
    return lines


def _share(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}%"


def short(name: str, width: int = NAME_WIDTH) -> str:
    """A class's name, fit for a column of a table."""
    return shorten(one_line(name), width)


def most_confused(matrix: Matrix, names: Sequence[str]) -> list[str]:
    """The pairs of classes that are taken for one another most often, such as `12.1% of cat taken for dog`."""
    pairs = [(t, p) for t, p in permutations(range(len(matrix)), 2) if matrix[t][p]]
    shares = sorted((-100 * matrix[t][p] / sum(matrix[t]), t, p) for t, p in pairs)
    most, width = (3, NAME_WIDTH) if len(matrix) <= MOST_COLUMNS else (10, LONG_NAME)
    return [f"{-s:5.1f}% of {short(names[t], width)} taken for {short(names[p], width)}" for s, t, p in shares[:most]]


def draw(matrix: Matrix, names: Sequence[str], title: str, folder: Path) -> list[Path]:
    """Write confusion.png and confusion.svg into `folder`: shares of each true class, in %. Returns their paths."""
    shares = [[100 * count / max(1, sum(row)) for count in row] for row in matrix]
    count = len(matrix)
    scale = max(1.0, count / 45)
    figure = new_figure(5.2 * scale, 4.5 * scale)
    axes = figure.add_subplot()
    # The colour goes with the square root: most of what is confused is below 10%, and would look like nothing.
    image = axes.imshow([[share**0.5 for share in row] for row in shares], cmap="Blues", vmin=0, vmax=10)
    for true, row in enumerate(shares):
        for predicted, share in enumerate(row):
            if matrix[true][predicted] and count <= 16:
                text = f"{share:.1f}" if share < 99.95 else "100"
                colour = "white" if share > 40 else "black"
                axes.text(predicted, true, text, ha="center", va="center", fontsize=min(6.5, 65 / count), color=colour)
    few = count <= MOST_COLUMNS
    labels = [short(name, NAME_WIDTH if few else LONG_NAME) for name in names]
    turn: dict[str, Any] = {"rotation": 40} if few else {"rotation": 90, "va": "center"}
    axes.set_xticks(range(count), labels, ha="right", rotation_mode="anchor", **turn)
    axes.set_yticks(range(count), labels)
    if not few:
        axes.tick_params(labelsize=max(4, min(7, 200 * scale / count)))
    axes.set(xlabel="predicted class", ylabel="true class", title=printable(title))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label="images of the true class, %")
    ticks = (0, 1, 5, 10, 25, 50, 100)
    bar.set_ticks([share**0.5 for share in ticks], labels=[str(share) for share in ticks])
    bar.outline.set_visible(False)
    return save_figure(figure, folder, "confusion", printable(title))


def measure(trained: TrainedModel, data: LabelledImages) -> tuple[float, float, Matrix]:
    """Accuracy in %, mean loss (label smoothing as in training), and the confusion matrix.

    The batches are the trainer's, summed in the same order, so the figures have the same bits.
    """
    import torch
    import torch.nn.functional as F

    from cifar_hpc.training.evaluation import evaluation_batch
    from cifar_hpc.training.trained_model import batches

    count, smoothing = len(data.labels), trained.spec.train.label_smoothing
    size = evaluation_batch(trained.info.image_size)
    sums = torch.zeros(-(-count // size), 2, dtype=torch.float64)
    predicted = torch.empty(count, dtype=torch.int64)
    labels = data.labels.to(trained.device)
    for first, logits in batches(trained, lambda first, last: data.images[first:last], count, "evaluating"):
        part = labels[first : first + size]
        found = logits.argmax(1)
        sums[first // size, 0] = F.cross_entropy(logits, part, label_smoothing=smoothing, reduction="sum").cpu()
        sums[first // size, 1] = (found == part).sum().cpu()
        predicted[first : first + size] = found.cpu()
    loss, correct = (float(value) for value in sums.sum(0))
    return 100 * correct / count, loss / count, confusion(data.labels, predicted, len(data.classes))


def _report(trained: TrainedModel, data: LabelledImages, logged: Mapping[str, Any] | None) -> dict[str, Any]:
    accuracy, loss, matrix = measure(trained, data)
    return {
        "run": trained.run,
        "file": str(trained.path),
        "step": trained.state.step,
        "epoch": trained.state.epoch,
        "weights": trained.weights,
        "data": data.source,
        "images": len(data.labels),
        "accuracy": accuracy,
        "loss": loss,
        "logged": logged,
        "classes": [
            {"label": n, "name": name, "images": sum(row), "correct": row[n], "accuracy": class_accuracy(matrix, n)}
            for n, (name, row) in enumerate(zip(data.classes, matrix, strict=True))
        ],
        "confusion": matrix,
        "device": trained.device.type,
        "amp": trained.amp,
        "figures": [],
        "notes": [*trained.notes, *data.notes],
    }


def _text(report: Mapping[str, Any], trained: TrainedModel, classes: tuple[str, ...], root: Path) -> str:
    from cifar_hpc.training.trained_model import summary

    smoothing = trained.spec.train.label_smoothing
    smoothed = f", with label smoothing {smoothing:g}" if smoothing else ""
    facts = {
        **trained.facts(root),
        "images": f"{report['images']:,} images, {report['data']}",
        "accuracy": f"{report['accuracy']:.2f}%{_beside(report, 'accuracy', '.2f', '%')}",
        "loss": f"{report['loss']:.4f}{_beside(report, 'loss', '.4f', '')}{smoothed}",
    }
    matrix = report["confusion"]
    body = ["", *table(matrix, classes), "", *most_confused(matrix, classes)]
    return summary(facts, body, report["notes"], [f"wrote {path}" for path in report["figures"]])


def _beside(report: Mapping[str, Any], key: str, form: str, unit: str) -> str:
    """The run's own figure, in brackets, where there is one."""
    logged = report["logged"]
    if logged is None:
        return ""
    value = logged[f"test_{key}"]
    if value == report[key]:
        return f" (the same as logged after epoch {logged['epoch']})"
    return f" (logged after epoch {logged['epoch']}: {value:{form}}{unit})"
