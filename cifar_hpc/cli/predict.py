"""python -m cifar_hpc predict: the class of each image, as a CSV that a competition takes."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from cifar_hpc.cli.evaluate import short
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.data.datasets import class_names
from cifar_hpc.data.image_input import open_images
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.paths import project_root
from cifar_hpc.training.trained_model import batches, load_trained, summary

COLUMNS = ("ID", "Labels")


def predict(run: str, input: str, out: str, weights: str) -> int:
    """Write a CSV of the columns ID and Labels (0 to 9), one row an image in the input's order, and print a summary.

    Raises:
        UserError: names the run, the file or the folder that is wrong; `out` is then unchanged.
    """
    root, path = project_root(), output_file(out)
    images = open_images(Path(input).expanduser())
    trained = load_trained(root, run, weights)
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
    facts["images"] = f"{len(labels):,} in {input}{left_out}"
    counts = Counter(labels)
    table = [
        f"{label} {short(name):12}{counts[label]:>9,}{100 * counts[label] / len(labels):>8.2f}%"
        for label, name in enumerate(class_names(trained.spec.data, root))
    ]
    body = ["", f"{'class':14}{'images':>9}{'share':>9}", *table, ""]
    written = f"wrote {path}: {','.join(COLUMNS)}, IDs {images.ids[0]} to {images.ids[-1]}"
    print(summary(facts, body, trained.notes, [written]))
    return 0
