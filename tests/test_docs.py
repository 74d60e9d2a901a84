"""The pages say what the code does: every key, field, event and file that they name, and none is left out."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT
from processes import Runs
from spec_page import PAGE, page

from cifar_hpc.__main__ import main
from cifar_hpc.cli.doctor.node import Finding
from cifar_hpc.cli.parser import build_parser
from cifar_hpc.config.sweep import _PARTS
from cifar_hpc.runs import events
from cifar_hpc.runs.events import Event
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.state import RunState
from cifar_hpc.training.checkpoints.store import _TYPES

FORMATS = (PROJECT / "docs" / "formats.md").read_text()
FOLDERS = ("", "docs", "benchmarks", "checkpoints", "logs", "slurm/minicluster")
PAGES = sorted(page for folder in FOLDERS for page in (PROJECT / folder).glob("*.md"))


def test_spec_page_is_the_specs() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.spec_page"


def section(title: str) -> str:
    """A part of formats.md, up to the next title."""
    return FORMATS.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def first_cells(text: str) -> set[str]:
    """The names in backquotes in the first cell of each row of a table."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in rows for name in re.findall(r"`([a-z_0-9]+)`", cell)}


def test_each_field_of_metrics_is_described(trained: Path) -> None:
    rows = read_jsonl(trained / "metrics.jsonl")
    assert rows
    assert first_cells(section("logs/&lt;run&gt;/metrics.jsonl")) == set(rows[0])


def test_each_event_is_described() -> None:
    names = {e.name for e in vars(events).values() if isinstance(e, type) and issubclass(e, Event)} - {Event.name}
    assert first_cells(section("logs/&lt;run&gt;/events.jsonl")) == names | {"tracking_failed"}  # of older versions


def test_each_field_of_events_is_described(trained: Path) -> None:
    text = section("logs/&lt;run&gt;/events.jsonl")
    for row in read_jsonl(trained / "events.jsonl"):
        line = next(line for line in text.splitlines() if line.startswith(f"| `{row['event']}`"))
        if "as `resumed`" in line:
            line += next(line for line in text.splitlines() if line.startswith("| `resumed`"))
        common = set(re.findall(r"`([a-z_]+)`", text.split("|", 1)[0]))
        assert set(row) - common <= set(re.findall(r"`([a-z_]+)`", line)), row


def test_each_field_of_an_environment_is_described(trained: Path) -> None:
    (started,) = [row for row in read_jsonl(trained / "events.jsonl") if row["event"] == "started"]
    assert first_cells(section("environment")) == set(started["environment"])


def test_each_field_of_status_is_described() -> None:
    assert first_cells(section("status --json")) == {field.name for field in dataclasses.fields(RunState)}


def test_each_field_of_compare_is_described(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, text = json_of(tiny_run, ["compare", "tiny"], capsys)["rows"][0], section("compare --json")
    assert first_cells(text) == set(row)
    assert set(row["members"][0]) <= set(re.findall(r"`([a-z_]+)`", text))


def test_each_field_of_evaluate_is_described(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, text = json_of(tiny_run, ["evaluate", "tiny"], capsys), section("evaluate --json")
    assert first_cells(text) == set(found)
    assert {*found["classes"][0], *found["logged"]} <= set(re.findall(r"`([a-z_]+)`", text))


def test_each_field_of_doctor_is_described() -> None:
    words = set(re.findall(r"`([a-z_]+)`", section("doctor --json")))
    assert words == {field.name for field in dataclasses.fields(Finding)}


def json_of(root: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_HPC_ROOT", str(root))
        assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_field_of_the_index_is_described() -> None:
    assert set(_TYPES) <= first_cells(section("checkpoints/&lt;run&gt;/index.json"))


def test_each_command_that_a_page_shows_is_one() -> None:
    begin = "python -m cifar_hpc "
    lines = [line for path in PAGES for line in path.read_text().splitlines() if line.startswith(begin)]
    assert len(lines) > 20
    for line in lines:
        text = re.sub(r"[][]|<(?=run>)|(?<=<run)>", "", line.removeprefix(begin))  # marks of what may be left out
        words = shlex.split(text, comments=True)
        build_parser().parse_args(words[: words.index(">")] if ">" in words else words)


def test_each_part_of_a_sweep_is_described() -> None:
    text = (PROJECT / "docs" / "sweeps.md").read_text()
    assert {*_PARTS, "parallel"} <= first_cells(text)


@pytest.mark.parametrize("path", PAGES, ids=[str(p.relative_to(PROJECT)) for p in PAGES])
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_docs_lists_its_pages() -> None:
    listed = (PROJECT / "docs" / "README.md").read_text()
    for path in (PROJECT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in listed, path.name


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Path:
    """The logs of a small run that has finished."""
    runs.finish("run", 1)
    return runs.root / "logs" / "run"


def test_architecture_names_files_and_functions_that_are_there() -> None:
    text = (PROJECT / "ARCHITECTURE.md").read_text()
    assert len(text.splitlines()) <= 150
    package = PROJECT / "cifar_hpc"
    rooms = {path.name for path in package.iterdir() if path.is_dir()}
    for file in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert (package / file).exists() or (PROJECT / file).exists(), file
    for name in re.findall(r"`(?!\w+\.py`)(\w+(?:\.\w+)+)`", text):
        parts = name.split(".")
        if parts[-1] == "py" or (parts[0] not in rooms and not (package / f"{parts[0]}.py").exists()):
            continue  # a key of the spec, a file name
        depth = next(n for n in range(len(parts), 0, -1) if package.joinpath(*parts[:n]).with_suffix(".py").exists())
        scope: ast.AST = ast.parse(package.joinpath(*parts[:depth]).with_suffix(".py").read_text())
        for part in parts[depth:]:
            found = [n for n in getattr(scope, "body", []) if getattr(n, "name", "") == part]
            assert found, f"{name}: {part} is not there"
            scope = found[0]


def test_the_readmes_screen_is_what_status_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of states that docs/screen.py has recorded."""
    monkeypatch.syspath_prepend(str(PROJECT / "docs"))
    screen = import_module("screen")
    text = (PROJECT / "README.md").read_text()
    assert screen.COMMAND in text and screen.replaced(text, screen.screen()) == text
    assert len(text.splitlines()) <= 120
