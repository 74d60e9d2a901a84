"""python -m cifar_hpc predict: the class of each image, as a CSV that a competition takes.

Writes a CSV with the columns ID and Labels, one row per image in the order of
the input, and says the accuracy where the input has labels: class folders,
or labels in the file. A CIFAR pickle is read without executing anything in it.
--out - writes to standard output, and all else to standard error.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from pathlib import Path

from cifar_hpc.cli.evaluate import short
from cifar_hpc.cli.parser import add_model_arguments
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.errors import SpecError
from cifar_hpc.files import expand_home, write_atomic
from cifar_hpc.runs.paths import project_root
from cifar_hpc.text import one_line

COLUMNS = ("ID", "Labels")
RESIZED = (
    "Image files of other sizes were resized to {0}x{0} pixels: turned as their EXIF data say, cut to the square in "
    "the middle (bicubic, antialiased)."
)

EXAMPLES = (
    "improved_resnet-1a2b3c4d images/ --out labels.csv",
    "improved_resnet-1a2b3c4d cifar_test_nolabels.pkl --out labels.csv --weights fast",
    "improved_resnet-1a2b3c4d photo.jpg --resize --names --probabilities --out -",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    text = "an image, a folder of images or of class folders, a .npy or .npz file, or a CIFAR pickle"
    parser.add_argument("input", metavar="INPUT", help=text)
    parser.add_argument("--out", metavar="FILE.csv", required=True, help="the CSV to write; - is standard output")
    parser.add_argument("--names", action="store_true", help="further columns: the class's name, and the file's")
    parser.add_argument("--probabilities", action="store_true", help="a further column for each class: its probability")
    parser.add_argument("--resize", action="store_true", help="resize image files to the size of the run's images")


def main(arguments: argparse.Namespace) -> int:
    """Write a CSV of the columns ID and Labels (from 0), one row per image in the input's order, and print a summary.

    Raises:
        UserError: names the run, the file or the folder that is wrong; the output is then unchanged.
    """
    from cifar_hpc.data.datasets import match_classes
    from cifar_hpc.data.image_input import open_images
    from cifar_hpc.training.trained_model import batches, load_trained, summary

    root, path = project_root(), None if arguments.out == "-" else output_file(arguments.out)
    trained = load_trained(root, arguments.run, arguments.weights)
    resize = arguments.resize or trained.spec.data.image_size is not None
    images = open_images(Path(expand_home(arguments.input, "INPUT")), trained.info, resize)
    if arguments.resize and not images.files:
        raise SpecError(f"--resize: {arguments.input} is an array file; allowed: image files, or a folder of them.")
    labels: list[int] = []
    shares: list[list[float]] = []
    for _, logits in batches(trained, images.read, len(images.ids), "predicting"):
        labels += logits.argmax(1).tolist()
        shares += logits.softmax(1).tolist() if arguments.probabilities else []
    names = trained.info.classes
    columns = dict(zip(COLUMNS, (images.ids, labels), strict=True))
    if arguments.names:
        columns |= {"class": [names[label] for label in labels]}
        columns |= {"file": [str(file) for file in images.files]} if images.files else {}
    if arguments.probabilities:
        columns |= {f"p_{name}": [f"{row[n]:.6f}" for row in shares] for n, name in enumerate(map(one_line, names))}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if path is None:
        sys.stdout.buffer.write(text.getvalue().encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    else:
        write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))

    facts, notes = (
        trained.facts(root),
        [*trained.notes, *([RESIZED.format(trained.info.image_size)] if resize and images.files else [])],
    )
    left_out = f", and {images.left_out} left out that are no images by name" if images.left_out else ""
    facts["images"] = f"{len(labels):,} in {arguments.input}{left_out}"
    if images.labels is not None:
        true, _, more = match_classes(images.labels, images.classes or names, names)
        right = sum(found == label for found, label in zip(labels, true.tolist(), strict=True))
        facts["accuracy"], notes = f"{100 * right / len(labels):.2f}% by the labels of the input", [*notes, *more]
    counts, width = Counter(labels), len(str(len(names) - 1))
    table = [
        f"{label:<{width}} {short(name):12}{counts[label]:>9,}{100 * counts[label] / len(labels):>8.2f}%"
        for label, name in enumerate(names)
    ]
    body = ["", f"{'class':{width + 13}}{'images':>9}{'share':>9}", *table, ""]
    heads = ",".join(COLUMNS) + ", ..." * (len(columns) > 2)
    written = f"wrote {path or 'standard output'}: {heads}; IDs {images.ids[0]} to {images.ids[-1]}"
    print(summary(facts, body, notes, [written]), file=sys.stdout if path else sys.stderr)
    return 0
