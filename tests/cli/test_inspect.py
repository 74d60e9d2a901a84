"""python -m cifar_hpc inspect: what it says about files that are good, bad, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_files import save

from cifar_hpc.__main__ import main
from cifar_hpc.training.checkpoints.store import candidates


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints of a run called run."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    folder = tmp_path / "checkpoints" / "run"
    save(folder, 5, 10, 15)
    return folder


def test_a_bad_file_is_an_error_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = candidates(folder)[0]
    newest.write_bytes(b"")
    for arguments in (["run", "--step", "15"], [str(newest)]):
        assert main(["inspect", *arguments]) == 1
        assert f"{newest}: empty. HINT" in capsys.readouterr().err
    newest.unlink()
    os.mkfifo(newest)
    assert main(["inspect", str(newest)]) == 1
    assert "is no regular file but a FIFO" in capsys.readouterr().err


def test_what_is_not_there_is_an_error_that_lists_what_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "run", "--step", "7"]) == 2
    assert "no checkpoint of step 7; there are: 15, 10, 5" in capsys.readouterr().err
    assert main(["inspect", str(folder / "none.pt")]) == 2


def test_where_all_are_bad_they_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("*.pt"):
        path.write_bytes(b"x")
    assert main(["inspect", "run", "--json"]) == 1
    error = capsys.readouterr().err
    assert all(f"{path}: no file of torch.save" in error for path in folder.glob("*.pt"))


def test_a_step_of_a_file_is_refused_and_the_screen_fits_80_columns(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tiny_run))
    monkeypatch.chdir(tiny_run)
    assert main(["inspect", "checkpoints/tiny/best.pt", "--step", "3"]) == 2
    assert "--step: checkpoints/tiny/best.pt is a file" in capsys.readouterr().err
    assert main(["inspect", "checkpoints/tiny/best.pt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[1].startswith("verified       yes")
