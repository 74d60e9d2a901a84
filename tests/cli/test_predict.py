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
from cifar_hpc.data.image_folder import decode
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
    assert confusion(data.labels, labels, 10) == measure(trained, data)[2]
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
    assert main(["predict", "tiny", str(tmp_path / "x.npy"), "--out", str(tmp_path / "x.npy" / "x.csv")]) == 2
    assert "x.npy cannot be made: File exists" in capsys.readouterr().err

    def fail(*_: Any) -> Any:
        raise RunFailedError("the model's outputs are NaN")

    monkeypatch.setattr(TrainedModel, "logits", fail)
    assert main(["predict", "tiny", str(tmp_path / "x.npy"), "--out", str(out)]) == 1
    assert out.read_text() == "old" and not made.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "labels.csv", "x.npy", "x.pkl"]


def test_labels_of_the_input_are_compared(root: Path, tmp_path: Path, capsys: Any) -> None:
    """Those of a file, and those of class folders, also where a class is called as another one in the run."""
    trained = load_trained(root, "tiny", "slow")
    data = own_images(trained.spec.data, root)
    accuracy = f"{measure(trained, data)[0]:.2f}%"
    np.savez(tmp_path / "x.npz", data=data.images.numpy(), labels=data.labels.numpy())
    (tmp_path / "x.pkl").write_bytes(
        pickle.dumps({"data": data.images.numpy().reshape(100, -1), "labels": data.labels.tolist()}, protocol=2)
    )
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = tmp_path / "folders" / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    for name in ("x.npz", "x.pkl", "folders"):
        assert main(["predict", "tiny", str(tmp_path / name), "--out", str(tmp_path / "out.csv")]) == 0
        assert f"accuracy    {accuracy} by the labels" in capsys.readouterr().out
        assert main(["evaluate", "tiny", "--data", str(tmp_path / name)]) == 0
        assert f"accuracy    {accuracy}" in capsys.readouterr().out
    np.savez(tmp_path / "x.npz", data=data.images.numpy(), labels=data.labels.numpy() + 100)  # of other classes
    assert main(["predict", "tiny", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out.csv")]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert main(["evaluate", "tiny", "--data", str(tmp_path / "x.npz")]) == 2
    assert "no labels" in (said := capsys.readouterr().err) and "HINT: python -m cifar_hpc predict" in said


def test_further_columns_on_standard_output(root: Path, tmp_path: Path, capfdbinary: Any) -> None:
    images = own_images(load_trained(root, "tiny", "slow").spec.data, root).images
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    assert main(["predict", "tiny", str(tmp_path / "one.png"), "--out", "-", "--names", "--probabilities"]) == 0
    out, said = (text.decode() for text in capfdbinary.readouterr())
    (row,) = csv.DictReader(out.splitlines())
    shares = [float(value) for key, value in row.items() if key.startswith("p_")]
    assert [*row][:4] == ["ID", "Labels", "class", "file"] and row["file"] == str(tmp_path / "one.png")
    assert len(shares) == 10 and sum(shares) == pytest.approx(1, abs=1e-4)
    assert shares.index(max(shares)) == int(row["Labels"]) and row["ID"] == "one"
    assert [*row][4 + int(row["Labels"])] == f"p_{row['class']}"
    assert "wrote standard output" in said


def test_images_of_other_sizes_only_where_that_is_asked_for(root: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "out.csv")
    Image.new("L", (64, 48), 200).save(tmp_path / "large.png")
    assert main(["predict", "tiny", str(tmp_path / "large.png"), "--out", out]) == 2
    assert "is 64x48 pixels; allowed: 32x32" in (said := capsys.readouterr().err) and "--resize" in said
    assert main(["predict", "tiny", str(tmp_path / "large.png"), "--out", out, "--resize"]) == 0
    assert "were resized to 32x32" in " ".join(capsys.readouterr().out.split())
    grey = decode([tmp_path / "large.png"], size=32)
    assert grey.unique().tolist() == [200]
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 32, 32), np.uint8))
    assert main(["predict", "tiny", str(tmp_path / "x.npy"), "--out", out, "--resize"]) == 2
