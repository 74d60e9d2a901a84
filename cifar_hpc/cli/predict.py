"""python -m cifar_hpc predict: the class of each image, as a CSV that a competition takes."""

import argparse
import csv
import io
from collections import Counter
from pathlib import Path

from cifar_hpc.cli.evaluate import short
from cifar_hpc.cli.parser import add_model_arguments
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.paths import project_root

COLUMNS = ("ID", "Labels")

DESCRIPTION = """\
Writes a CSV with the columns ID and Labels, one row per image in the order of
the input. A CIFAR pickle is read without executing anything in it."""
EXAMPLES = (
    "improved_resnet-1a2b3c4d images/ --out labels.csv",
    "improved_resnet-1a2b3c4d cifar_test_nolabels.pkl --out labels.csv --weights fast",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("input", metavar="INPUT", help="a folder of images, a .npy or .npz file, or a CIFAR pickle")
    parser.add_argument("--out", metavar="FILE.csv", required=True, help="the CSV to write")


def main(arguments: argparse.Namespace) -> int:
    """Write a CSV of the columns ID and Labels (0 to 9), one row per image in the input's order, and print a summary.

    Raises:
        UserError: names the run, the file or the folder that is wrong; the output is then unchanged.
    """
    from cifar_hpc.data.datasets import class_names
    from cifar_hpc.data.image_input import open_images
    from cifar_hpc.training.trained_model import batches, load_trained, summary

    root, path = project_root(), output_file(arguments.out)
    images = open_images(Path(arguments.input).expanduser())
    trained = load_trained(root, arguments.run, arguments.weights)
    labels: list[int] = []
    for _, logits in batches(trained, images.read, len(images.ids), "predicting"):
        labels += logits.argmax(1).tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(images.ids, labels, strict=True))
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))

    facts = trained.facts(root)
    left_out = f", and {images.left_out} left out that are no images by name" if images.left_out else ""
    facts["images"] = f"{len(labels):,} in {arguments.input}{left_out}"
    counts = Counter(labels)
    table = [
        f"{label} {short(name):12}{counts[label]:>9,}{100 * counts[label] / len(labels):>8.2f}%"
        for label, name in enumerate(class_names(trained.spec.data, root))
    ]
    body = ["", f"{'class':14}{'images':>9}{'share':>9}", *table, ""]
    written = f"wrote {path}: {','.join(COLUMNS)}, IDs {images.ids[0]} to {images.ids[-1]}"
    print(summary(facts, body, trained.notes, [written]))
    return 0
