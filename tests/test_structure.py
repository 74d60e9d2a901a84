"""Rules that keep the package a place where the right file is found at once: size of files and folders, docstrings."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cifar_hpc"
FILES = sorted(PACKAGE.rglob("*.py"))
RIDDLES = re.compile(r"(What|Who|Whose|How|Whether)\b")


def test_files_are_short_and_folders_small() -> None:
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 420] == []
    assert [folder for folder, number in Counter(path.parent for path in FILES).items() if number > 20] == []
    assert len(FILES) <= 118


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_open_with_a_verb_or_a_noun_phrase(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    assert [text.splitlines()[0] for text in texts if RIDDLES.match(text)] == []
