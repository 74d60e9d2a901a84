"""Figures become files: the same figure the same file, and never a half one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from helpers import PROJECT, leftovers
from PIL import Image

from cifar_hpc.cli.figures.style import PNG_DPI, new_figure, save_figure


def draw(folder: Path, text: str = "a") -> list[Path]:
    folder.mkdir(exist_ok=True)
    figure = new_figure(3.5, 2)
    figure.subplots().set_title(text)
    return save_figure(figure, folder, "name", title="two runs")


def test_both_forms_are_written_in_the_size_of_print(tmp_path: Path) -> None:
    png, svg = draw(tmp_path)
    assert (png.name, svg.name) == ("name.png", "name.svg")
    with Image.open(png) as image:
        assert image.size == (3.5 * PNG_DPI, 2 * PNG_DPI)
        assert image.info["Title"] == "two runs"
    root = ElementTree.parse(svg).getroot()
    assert root.attrib["width"] == f"{3.5 * 72:g}pt"
    assert leftovers(tmp_path) == []


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    first, second = ([path.read_bytes() for path in draw(tmp_path / name)] for name in "ab")
    assert first == second


def test_no_display_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(matplotlib, "use", lambda name: name if name == "agg" else pytest.fail(name))
    draw(tmp_path)


@pytest.mark.parametrize("text", ["$x", r"a$\frac{$", "漢字", "under_score <&>"])
def test_names_are_shown_as_they_are(tmp_path: Path, text: str) -> None:
    svg = draw(tmp_path, text)[1]
    assert text in "".join(ElementTree.parse(svg).getroot().itertext())


@pytest.mark.process
def test_a_backend_that_jupyter_has_set_is_not_needed(tmp_path: Path) -> None:
    code = "from cifar_hpc.cli.figures.style import new_figure; new_figure(1, 1).savefig('x.png')"
    environment = os.environ | {"MPLBACKEND": "module://no_such_module", "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.png").exists()
