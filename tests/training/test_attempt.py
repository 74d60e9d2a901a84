"""One start of a run, in a process of its own: what it finds, and what it refuses to go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import PROJECT
from PIL import Image
from processes import command

from cifar_hpc.data.synthetic import CLASSES, make_synthetic

SET = (
    "model.width_multiplier=0.0625 model.blocks=[1,1,1] train.batch_size=10 train.device=cpu train.amp=fp32 "
    "train.cpu_threads=1 data.source=folder lookahead.bn_batches=1 resources.gpus_per_node=0"
).split()


def draw_folder(folder: Path, seed: int) -> None:
    train, train_labels, test, test_labels = make_synthetic(40, 20, seed)
    for split, images, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / split / CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def train(root: Path, images: str, epochs: int) -> tuple[int, str]:
    """Its exit status and its output."""
    keys = [*SET, f"data.root={root / images}", f"train.epochs={epochs}"]
    return command(root, "train", str(PROJECT / "jobs" / "improved_resnet.yaml"), "--name", "run", "--set", *keys)


@pytest.mark.process
def test_images_that_moved_are_fine_and_other_images_are_refused(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", seed=1)
    draw_folder(tmp_path / "others", seed=2)
    status, output = train(tmp_path, "images", epochs=1)
    assert status == 0, output
    (tmp_path / "images").rename(tmp_path / "moved")

    status, output = train(tmp_path, "others", epochs=2)
    assert status == 1
    assert f"the training images in {tmp_path / 'others'} are not those that run run was started with" in output
    assert "Traceback" not in output

    status, output = train(tmp_path, "moved", epochs=2)
    assert status == 0, output
    rows = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
