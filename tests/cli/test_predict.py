"""python -m cifar_hpc predict: the same labels from whatever the images lie in, in the competition's CSV."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_hpc.__main__ import main
from cifar_hpc.cli.evaluate import confusion, measure
from cifar_hpc.data.datasets import own_images
from cifar_hpc.errors import RunFailedError
from cifar_hpc.training.trained_model import TrainedModel, load_trained


@pytest.fixture
def root(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tiny_run))
    return tiny_run


def write(folder: Path, images: np.ndarray[Any, Any]) -> dict[str, Path]:
    """The images in every kind of input."""
    np.save(folder / "x.npy", images)
    np.savez(folder / "x.npz", images=images.transpose(0, 2, 3, 1))
    (folder / "x.pkl").write_bytes(pickle.dumps({b"data": images.reshape(len(images), -1)}))
    (folder / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "folder" / f"{number}.png")
    return {name: folder / name for name in ("x.npy", "x.npz", "x.pkl", "folder")}


def test_every_input_gives_the_labels_that_evaluate_counts(root: Path, tmp_path: Path, capsys: Any) -> None:
    trained = load_trained(root, "tiny", "slow")
    data = own_images(trained.spec.data, root)
    contents = []
    for name, path in write(tmp_path, data.images.numpy()).items():
        assert main(["predict", "tiny", str(path), "--out", str(tmp_path / f"{name}.csv")]) == 0
        contents.append((tmp_path / f"{name}.csv").read_text())
    assert len(set(contents)) == 1
    header, *rows = list(csv.reader(contents[0].splitlines()))
    assert header == ["ID", "Labels"] and [row[0] for row in rows] == [str(n) for n in range(100)]
    labels = torch.tensor([int(row[1]) for row in rows])
    assert confusion(data.labels, labels) == measure(trained, data)[2]
    assert contents[0].startswith(f"ID,Labels\n0,{labels[0]}\n1,")
    out = capsys.readouterr().out
    assert "wrote" in out and "IDs 0 to 99" in out and "images      100 in " in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80


def test_the_weights_and_the_ids_are_those_asked_for(root: Path, tmp_path: Path, capsys: Any) -> None:
    trained = load_trained(root, "tiny", "fast")
    images = own_images(trained.spec.data, root).images
    path, out = tmp_path / "x.pkl", tmp_path / "labels.csv"
    path.write_bytes(pickle.dumps({b"data": images.numpy(), b"ids": np.arange(100)[::-1]}))
    out.write_text("old")
    assert main(["predict", "tiny", str(path), "--out", str(out), "--weights", "fast"]) == 0
    labels = trained.logits(images).argmax(1).tolist()
    assert out.read_text().split() == ["ID,Labels", *(f"{99 - n},{label}" for n, label in enumerate(labels))]
    summary = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(words[2]) for words in summary if words and words[0].isdigit()] == [labels.count(n) for n in range(10)]


def test_names_of_files_are_kept_whatever_they_hold(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in").mkdir()
    names = ['a,"b"', "\x1b[2J", "\udcff"]
    for name in names:
        Image.new("RGB", (32, 32)).save(tmp_path / "in" / f"{name}.png")
    assert main(["predict", "tiny", str(tmp_path / "in"), "--out", str(tmp_path / "x.csv")]) == 0
    with (tmp_path / "x.csv").open(newline="", errors="surrogateescape") as file:
        assert {row["ID"] for row in csv.DictReader(file)} == set(names)
    assert "\x1b" not in capsys.readouterr().out


def test_a_failure_leaves_the_file_as_it_was(
    root: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "labels.csv"
    out.write_text("old")
    np.save(tmp_path / "x.npy", np.zeros((2, 32, 32, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    made = tmp_path / "made"
    hostile = b"\x80\x02cos\nsystem\nX\x06\x00\x00\x00touch \x85R."
    (tmp_path / "x.pkl").write_bytes(hostile)
    for arguments, words in [
        (["none", "x.npy"], "no such run"),
        (["tiny", "empty"], "holds no image"),
        (["tiny", "none"], "there is no such file or folder"),
        (["tiny", "x.pkl"], "it names os.system, which could be any code; nothing in it was executed"),
    ]:
        assert main(["predict", arguments[0], str(tmp_path / arguments[1]), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert main(["predict", "tiny", str(tmp_path / "x.npy"), "--out", str(tmp_path / "no" / "x.csv")]) == 2
    assert "there is no folder" in capsys.readouterr().err

    def fail(*_: Any) -> Any:
        raise RunFailedError("the model's outputs are NaN")

    monkeypatch.setattr(TrainedModel, "logits", fail)
    assert main(["predict", "tiny", str(tmp_path / "x.npy"), "--out", str(out)]) == 1
    assert out.read_text() == "old" and not made.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "labels.csv", "x.npy", "x.pkl"]
