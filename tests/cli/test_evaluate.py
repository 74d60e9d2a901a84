"""python -m cifar_hpc evaluate: the very figures that the run has logged, and what else it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_files import write_classes
from processes import Runs

from cifar_hpc.__main__ import main
from cifar_hpc.data.synthetic import CLASSES
from cifar_hpc.runs.logs import read_jsonl

KEYS = (
    "run file step epoch weights data images accuracy loss logged classes confusion device amp figures notes"
).split()


@pytest.fixture
def root(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tiny_run))
    return tiny_run


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def logged(root: Path, run: str, epoch: int) -> dict[str, Any]:
    row = read_jsonl(root / "logs" / run / "metrics.jsonl")[epoch - 1]
    return {key: row[key] for key in ("epoch", "test_accuracy", "test_loss")}


def test_the_figures_are_those_logged_to_the_last_bit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, epoch in [(["tiny"], 2), ([str(root / "checkpoints" / "tiny" / "step_00000009.pt")], 1)]:
        found = report(capsys, *arguments)
        row = logged(root, "tiny", epoch)
        assert (found["accuracy"], found["loss"]) == (row["test_accuracy"], row["test_loss"])
        assert found["logged"] == row and found["epoch"] == epoch
    for key in ("accuracy", "loss"):
        assert report(capsys, "tiny", "--weights", "fast")[key] != found[key]


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["lookahead.enabled=false", "train.amp=bf16", "train.epochs=1"], "fast"),
        (
            ["ema.decay=0.9", "data.test_size=null", "data.holdout=50", "train.epochs=1", "train.label_smoothing=0"],
            "averaged",
        ),
    ],
    ids=["plain", "averaged"],
)
def test_so_are_those_of_other_kinds_of_runs(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: Any, overrides: list[str], weights: str
) -> None:
    runs.finish(weights, 1, *overrides)
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
    found, row = report(capsys, weights), logged(runs.root, weights, 1)
    assert (found["accuracy"], found["loss"], found["weights"]) == (row["test_accuracy"], row["test_loss"], weights)
    assert found["logged"] == row


def test_the_report_is_whole_and_fits_together(root: Path, tmp_path: Path, capsys: Any) -> None:
    found = report(capsys, "tiny", "--out", str(tmp_path / "figures"))
    assert list(found) == KEYS
    assert (found["run"], found["weights"], found["images"], found["step"]) == ("tiny", "slow", 100, 18)
    assert (found["device"], found["amp"], found["data"], found["notes"]) == ("cpu", "fp32", "synthetic", [])
    matrix = found["confusion"]
    assert sum(map(sum, matrix)) == 100
    assert 100 * sum(matrix[label][label] for label in range(10)) / 100 == found["accuracy"]
    for label, entry in enumerate(found["classes"]):
        assert entry == {
            "label": label,
            "name": CLASSES[label],
            "images": 10,
            "correct": matrix[label][label],
            "accuracy": 100 * matrix[label][label] / 10,
        }
    assert [Path(path).name for path in found["figures"]] == ["confusion.png", "confusion.svg"]
    assert all(Path(path).stat().st_size > 1000 for path in found["figures"])


def test_the_text_fits_80_columns_and_says_where_the_figures_stand(root: Path, capsys: Any) -> None:
    assert main(["evaluate", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text, row = "\n".join(lines), logged(root, "tiny", 2)
    assert f"accuracy    {row['test_accuracy']:.2f}% (the same as logged after epoch 2)" in text
    assert f"loss        {row['test_loss']:.4f} (the same as logged after epoch 2), with label smoothing 0.1" in text
    assert "checkpoint  checkpoints/tiny/step_00000018.pt" in text
    assert sum(line[:1].isdigit() for line in lines) == 10


def test_the_same_images_from_elsewhere_give_the_same_accuracy(root: Path, tmp_path: Path, capsys: Any) -> None:
    write_classes(tmp_path / "test", CLASSES)
    found = report(capsys, "tiny", "--data", str(tmp_path))
    assert (found["images"], found["logged"], found["data"]) == (20, None, str(tmp_path / "test"))
    assert [entry["images"] for entry in found["classes"]] == [2] * 10
    assert main(["evaluate", "tiny", "--data", str(tmp_path)]) == 0
    assert "logged" not in capsys.readouterr().out


def test_a_users_mistakes_are_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    for arguments, status, words in [
        (["none"], 2, "no such run"),
        (["tiny", "--data", str(tmp_path / "none")], 2, "is no folder"),
        (["tiny", "--out", str(tmp_path / "file")], 2, "cannot be made"),
        ([str(tmp_path / "file.pt")], 2, "there is no such file"),
        ([str(tmp_path / "file")], 1, "empty"),
    ]:
        assert main(["evaluate", *arguments]) == status
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and words in error
