"""python -m cifar_hpc report: one file that stands by itself and shows text of any origin as text."""

from __future__ import annotations

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import leftovers
from run_logs import event, make_run, write_events, write_metrics

from cifar_hpc.__main__ import main
from cifar_hpc.runs.paths import RunPaths

HOSTILE = "<script>alert('1')</script> & \"<b>\" </pre></svg>"
EMPTY = {"meta", "br"}  # elements without an end


class Page(HTMLParser):
    """A page whose elements end in the order in which they began; all other ends are errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, tag  # HTML has no such form
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(root: Path, name: str, *accuracies: float, dropout: float = 0.1) -> RunPaths:
    run = make_run(root, name, model={"dropout": dropout})
    environment = {"device": f"A100 {HOSTILE}", "torch": "2.14.1"}
    write_events(
        run,
        [
            event(0, "submitted"),
            event(5, "started", step=0, environment=environment, command=HOSTILE),
            event(6, "first_step", step=1),
            event(30, "signal", step=12),
            event(31, "requeued", reason="preemption"),
            event(90, "resumed", step=12, restart=1, environment=environment, command=HOSTILE),
        ],
    )
    write_metrics(run, accuracies)
    run.train_log.write_text("".join(f"line {n}\n" for n in range(99)) + f"epoch \x1b[31m {HOSTILE}\n")
    return run


def report(root: Path, *arguments: str) -> Page:
    assert main(["report", *arguments, "--out", "report.html"]) == 0
    text = (root / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>\n")
    page = Page(text)
    assert page.open == []
    assert leftovers(root) == []
    return page


def test_a_run_is_one_file_with_all_that_is_known(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", 10, 30)
    page = report(root, "a")
    out, err = capsys.readouterr()
    assert (out, err) == ("report.html\n", "")
    assert page.tags["svg"] == page.tags["figure"] == 4
    assert page.rows[0][:3] == ["runs", "seeds", "test %"]
    assert page.rows[1][:3] == ["a", "0/1", "30.00"]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["a"] == [
        "2026-01-02 03:00:30 UTC preempted\n2026-01-02 03:01:30 UTC restart\n2026-01-02 03:01:30 UTC under way"
    ]
    assert rows["restarts by cause"] == ["1 preemption"]
    assert rows["hardware"] == [f"1 × A100 {HOSTILE}"]
    assert rows["versions"] == ["torch 2.14.1"]
    assert rows["model.dropout"] == ["0.1", "0.2"]
    assert "model.activation" not in rows
    text = "".join(page.words)
    assert "activation: leaky_relu" in text  # in the whole spec
    assert "test: 30.00% at epoch 2" in text
    assert "line 70\n" in text
    assert "line 60\n" not in text


def test_nothing_is_loaded_from_elsewhere_and_ids_are_unique(root: Path) -> None:
    for n in range(3):
        make(root, f"r{n}", 10, 20 + n, dropout=n / 10)
    page = report(root, "r*")
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert ids
    assert set(ids.values()) == {1}
    text = (root / "report.html").read_text()
    links = [value for name, value in page.attributes if name in ("href", "xlink:href", "src", "action", "data")]
    used = links + re.findall(r"url\(([^)]*)\)", text)
    assert used
    assert {link.removeprefix("#") for link in used} <= set(ids)
    assert all(link.startswith("#") for link in used)
    assert "@import" not in text
    assert page.tags["style"] == 1


def test_text_of_a_run_is_shown_as_text(root: Path) -> None:
    run = make(root, "a", 10)
    run.spec.write_text(f"'{HOSTILE.replace(chr(39), chr(39) * 2)}': 1\n")
    page = report(root, "a")
    assert page.tags["script"] == page.tags["b"] == 0
    assert "".join(page.words).count("<script>alert('1')</script>") >= 4  # log, hardware, command, problem of the spec
    assert "\x1b" not in (root / "report.html").read_text()


def test_runs_without_an_epoch_have_a_report(root: Path) -> None:
    make_run(root, "new")
    text = "".join(report(root, "new").words)
    for words in ("No epoch is finished yet.", "nothing yet", "There is no log yet."):
        assert words in text


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("report.pdf", "allowed: a file name that ends with .html"),
        ("logs/a/spec.yaml/report.html", "spec.yaml cannot be made: File exists"),
    ],
)
def test_a_file_that_cannot_be_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    make(root, "a", 10)
    assert main(["report", "a", "--out", out]) == 2
    assert message in capsys.readouterr().err


def test_a_report_that_fails_leaves_the_old_one(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, "a", 10)
    (root / "report.html").write_text("old")
    assert main(["report", "b", "--out", "report.html"]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "a", "--out", "report.html"]) == 2
    assert "figures take matplotlib" in capsys.readouterr().err
    assert (root / "report.html").read_text() == "old"
    assert leftovers(root) == []
