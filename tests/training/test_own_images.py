"""The promise for images that are the user's own, with real processes; and no checkpoint runs code that it names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import Runs

from cifar_hpc import tensorfile
from cifar_hpc.__main__ import main
from cifar_hpc.data.info import CIFAR10_MEAN, CIFAR10_STD
from cifar_hpc.files import replacing
from cifar_hpc.runs.frozen_spec import require_frozen
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import trained_model
from cifar_hpc.training.trained_model import load_trained

MINE = """
import numpy as np


def load(image_size, count):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 5
    images = rng.integers(0, 200, (count, image_size, image_size, 3), np.uint8)
    images[np.arange(count), :, :, labels % 3] += 50
    return images, labels, images[:40], labels[:40], [f"kind {n}" for n in range(5)]


def drawn_anew(image_size, count):
    images, *others = load(image_size, count)
    images[0] = np.random.default_rng().integers(0, 200, images[0].shape, np.uint8)
    return images, *others
"""
ALL = ("data.train_size=null", "data.test_size=null")
CASES = {
    "folder": ("data.source=folder", "data.root=flowers", *ALL),
    "photos": ("data.source=folder", "data.root=photos", "data.image_size=20", "data.holdout=32", *ALL),
    "target": ("data.source=cifar10", "data.target=mine.py:load", "data.args={count: 264}", "data.image_size=24", *ALL),
}


def draw(path: Path, size: tuple[int, int], label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path)) + label).integers(0, 200, (*size, 3), np.uint8)
    pixels[..., label] += 50
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module", autouse=True)
def files(runs: Runs) -> None:
    (runs.root / "mine.py").write_text(MINE)
    for number in range(264):
        label = number % 3
        draw(runs.root / "flowers" / "train" / f"flower {label}" / f"{number}.png", (28, 28), label)
        draw(runs.root / "photos" / f"flower {label}" / f"{number}.jpg", (40 + number % 7, 30), label)
        if number < 40:
            draw(runs.root / "flowers" / "test" / f"flower {label}" / f"{number}.png", (28, 28), label)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_moved_it_ends_in_the_same_bits_and_is_evaluated(
    runs: Runs, look: Any, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    runs.finish(f"{case}-alone", 1, *CASES[case])
    runs.kill(case, 2, *CASES[case], interrupt="SIGKILL@step:6")
    runs.finish(case, 1, *CASES[case])
    assert look(runs, case) == look(runs, f"{case}-alone")
    size, classes = {"folder": (28, 3), "photos": (20, 3), "target": (24, 5)}[case]
    assert require_frozen(RunPaths(runs.root, case)).data.image_size == size
    info = load_trained(runs.root, case, "slow").info
    assert (info.image_size, len(info.classes)) == (size, classes)
    assert main(["evaluate", case]) == 0
    assert "the same as logged after epoch 2" in capsys.readouterr().out


def test_a_function_that_gives_other_images_at_the_next_start_is_named(runs: Runs) -> None:
    words = ("data.source=cifar10", "data.target=mine.py:drawn_anew", *CASES["target"][2:])
    runs.kill("anew", 1, *words, interrupt="SIGKILL@step:6")
    assert runs.start("anew", 1, *words) == [1]
    log = " ".join(runs.log("anew").split())
    assert "data.target: the training images that 'mine.py:drawn_anew' gives are not those that run anew was" in log
    assert "HINT: it must give the same images at every start" in log


def test_a_run_of_an_earlier_version_keeps_the_mean_that_it_began_with(runs: Runs) -> None:
    """Its checkpoints hold no facts of the images, and it took CIFAR-10's mean for all of them."""
    words = ("data.source=folder", "data.root=small", *ALL)
    for number in range(264):
        draw(runs.root / "small" / "train" / f"flower {number % 10}" / f"{number}.png", (32, 32), number % 3)
    shutil.copytree(runs.root / "small" / "train", runs.root / "small" / "test")
    runs.kill("earlier", 1, *words, interrupt="SIGKILL@step:11")
    for path in (runs.root / "checkpoints" / "earlier").glob("*.pt"):
        content = tensorfile.load(path)
        assert content.pop("dataset")["mean"] != CIFAR10_MEAN
        with replacing(path) as file:
            tensorfile.save(tensorfile.seal(content), file)
    runs.finish("earlier", 1, *words)
    assert [row["event"] for row in runs.events("earlier", "resumed")] == ["resumed"]
    info = load_trained(runs.root, "earlier", "slow").info
    assert (info.mean, info.std) == (CIFAR10_MEAN, CIFAR10_STD) and info.classes[9] == "flower 9"


def test_a_checkpoint_of_another_target_runs_no_code(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.finish("target", 1, *CASES["target"])
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
    trained, made = load_trained(runs.root, "target", "slow"), runs.root / "made"
    crafted = replace(trained.spec.data, target="pathlib:Path.mkdir", code=None, args={"self": str(made)})
    forged = replace(trained, spec=replace(trained.spec, data=crafted))
    monkeypatch.setattr(trained_model, "load_trained", lambda *_: forged)
    assert main(["evaluate", "target"]) == 2
    error = capsys.readouterr().err
    assert "its images come from 'pathlib:Path.mkdir', which is run only for a checkpoint of a run" in error
    assert not made.exists()
