"""python -m cifar_hpc plot, from the command line to the files."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import PROJECT, leftovers
from run_logs import event, make_run, write_events, write_metrics

from cifar_hpc.__main__ import main
from cifar_hpc.cli.figures import plot
from cifar_hpc.config.io import to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.paths import RunPaths

FIGURES = ["accuracy", "loss", "learning_rate", "timeline"]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(root: Path, name: str, accuracies: Sequence[float], **sections: Any) -> RunPaths:
    run = make_run(root, name, **sections)
    write_events(run, [event(0, "submitted"), event(5, "started", step=0), event(6, "first_step", step=1)])
    write_metrics(run, accuracies)
    return run


def words_of(svg: Path) -> str:
    return "\n".join(ElementTree.parse(svg).getroot().itertext())


def test_a_run_has_four_figures_in_two_forms(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10, 30, 20])
    assert main(["plot", "a"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"figures/{name}.{form}" for name in FIGURES for form in ("png", "svg")]
    assert err == ""
    assert all((root / path).stat().st_size > 1000 for path in out.splitlines())
    assert leftovers(root) == []
    assert "test: 20.00% at epoch 3" in words_of(root / "figures/accuracy.svg")
    assert "best: 30.00% at epoch 2" in words_of(root / "figures/accuracy.svg")
    assert "training: 24 s" in words_of(root / "figures/timeline.svg")


def test_figures_go_where_out_says_and_replace_older_ones(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(root, "a", [10])
    assert main(["plot", "a", "--out", "x/y"]) == 0
    before = (root / "x/y/accuracy.png").read_bytes()
    write_metrics(run, [10, 20])
    assert main(["plot", "a", "--out", str(root / "x/y")]) == 0
    assert (root / "x/y/accuracy.png").read_bytes() != before
    assert capsys.readouterr().out.splitlines()[-1] == str(root / "x/y/timeline.svg")


def test_different_models_have_a_figure_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        make(root, f"small-{seed}", [10], model={"blocks": [1, 1], "widths": [64, 128]}, train={"seed": seed})
        make(root, f"large-{seed}", [10], model={"blocks": [1, 2], "widths": [64, 128]}, train={"seed": seed})
    assert main(["plot", "*"]) == 0
    names = {Path(path).stem for path in capsys.readouterr().out.splitlines()}
    assert names == {"architecture-small-0", "architecture-large-0", *FIGURES}
    assert "blocks [1, 1], 2 seeds" in words_of(root / "figures/accuracy.svg")
    assert "blocks [1, 2], seed 1" in words_of(root / "figures/timeline.svg")


def test_a_shape_that_all_runs_share_is_drawn_once_and_only_if_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root, "relu", [10], model={"activation": "relu"})
    make(root, "leaky", [10], model={"dropout": 0.3})
    assert main(["plot", "*"]) == 0
    assert "architecture" not in capsys.readouterr().out
    assert main(["plot", "*", "--only", "architecture", "--format", "svg"]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert path in ("figures/architecture-leaky.svg", "figures/architecture-relu.svg")  # says whose dropout it has
    assert main(["plot", "relu", "--only", "loss,architecture", "--format", "svg"]) == 0
    assert capsys.readouterr().out.splitlines() == ["figures/architecture.svg", "figures/loss.svg"]
    assert "bottleneck, shortcut by 1×1 convolution" in words_of(root / "figures/architecture.svg")


def test_pdf_has_fonts_that_journals_take_and_is_the_same_file_each_time(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root, "a", [10, 30, 20])
    assert main(["plot", "a", "--only", "loss,timeline", "--format", "pdf,svg"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"figures/{n}.{f}" for n in ("loss", "timeline") for f in ("pdf", "svg")
    ]
    content = (root / "figures/loss.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/Type3" not in content
    assert main(["plot", "a", "--only", "loss", "--format", "pdf"]) == 0
    assert (root / "figures/loss.pdf").read_bytes() == content


def test_labels_and_marks_are_chosen(root: Path) -> None:
    for seed in (0, 1):
        write_metrics(make(root, f"a{seed}", [], model={"dropout": 0.5}, train={"seed": seed}), [10, 20], restarts=[2])
    make(root, "b", [10, 30])
    assert main(["plot", "*", "--label", "a1=half <b>", "--label", "b=$x$ = 1", "--only", "accuracy,timeline"]) == 0
    words = words_of(root / "figures/accuracy.svg")
    assert "half <b>, 2 seeds: 20.00 ± 0.00%" in words
    assert "$x$ = 1: 30.00%" in words
    assert "dropout" not in words
    assert "restart" in words
    assert {"half <b>, seed 0", "half <b>, seed 1", "$x$ = 1"} <= set(
        words_of(root / "figures/timeline.svg").split("\n")
    )
    assert main(["plot", "*", "--no-restarts", "--only", "accuracy"]) == 0
    assert "restart" not in words_of(root / "figures/accuracy.svg")


def test_runs_of_one_seed_are_one_line_and_a_note(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10, 20])
    make(root, "b", [10, 30])
    assert main(["plot", "*", "--only", "accuracy,timeline"]) == 0
    assert capsys.readouterr().err == "note: not drawn, since another run of the same settings and seed is: b\n"
    words = words_of(root / "figures/accuracy.svg")
    assert "test: 20.00% at epoch 2" in words
    assert "standard deviation" not in words
    assert {"a", "b"} <= {word.strip() for word in words_of(root / "figures/timeline.svg").split()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "acuracy"], "--only: 'acuracy' is not allowed; allowed: accuracy, loss, learning_rate, timeline, "
         "architecture. HINT: did you mean 'accuracy'?"),
        (["--only", "timeline", "--terminal"], "'timeline' is not allowed; allowed: accuracy, loss, learning_rate."),
        (["--format", "png,gif"], "--format: 'gif' is not allowed; allowed: png, svg, pdf."),
        (["--label", "run-c=x"], "--label: 'run-c=x' is not allowed; allowed: RUN=TEXT, runs: run-a, run-b. "
         "HINT: did you mean 'run-b'?"),
        (["--label", "run-a"], "--label: 'run-a' is not allowed; allowed: RUN=TEXT"),
        (["--label", "run-a=x", "--label", "run-b=y"], "--label: 'run-b=y': its line is labelled 'x'; "
         "allowed: one for all seeds."),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    make(root, "run-a", [10], train={"seed": 0})
    make(root, "run-b", [10], train={"seed": 1})
    assert main(["plot", "run-*", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "figures").exists()


def test_without_matplotlib_the_error_names_what_still_works(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make(root, "a", [10])
    assert main(["plot", "a"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "figures take matplotlib, which does not load here" in err
    assert "plot --terminal and compare work without it" in err
    assert not (root / "figures").exists()
    assert main(["plot", "a", "--terminal"]) == 0


@pytest.mark.process
def test_a_home_that_cannot_be_written_to_changes_nothing(root: Path) -> None:
    make(root, "a", [10])
    (root / "file").touch()  # a HOME below it can be made by nobody, root included
    command = [
        sys.executable,
        "-m",
        "cifar_hpc",
        "plot",
        "a",
        "--only",
        "loss",
        "--format",
        "svg",
        "--out",
        str(root / "f"),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL"))} | {
        "HOME": str(root / "file/x")
    }
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    assert done.stdout == f"{root}/f/loss.svg\n"


def test_not_all_of_too_many_models_are_drawn(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "MOST_ARCHITECTURES", 1)
    monkeypatch.setattr(plot, "MOST_ROWS", 1)
    for rate in (0.0625, 0.125):
        make(root, f"r{rate}", [10], model={"width_multiplier": rate})
    assert main(["plot", "r*"]) == 0
    out, err = capsys.readouterr()
    assert out.count("architecture") == 2
    assert err.splitlines() == [
        "note: the runs have 2 different models, of which 1 are drawn",
        "note: the timeline shows the first 1 runs of 2",
    ]
    assert "1 more runs are not shown" in words_of(root / "figures/timeline.svg")


def test_without_pytorch_all_but_the_architecture_is_drawn(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cifar_hpc.models.summary", raising=False)
    make(root, "a", [10])
    assert main(["plot", "a", "--only", "loss,architecture"]) == 0
    out, err = capsys.readouterr()
    assert [Path(path).stem for path in out.splitlines()][::2] == ["loss"]
    assert err.startswith(
        "note: the architecture is left out, since drawing it takes PyTorch, which does not load here"
    )


def test_a_network_whose_code_is_gone_costs_its_architecture_only(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (root / f"{name}.py").write_text("class Net: pass\n")
        make(root, name, [10], model=to_plain(Spec())["model"] | {"target": f"{name}.py:Net"})
    assert main(["plot", "*"]) == 0
    out, err = capsys.readouterr()
    assert {Path(path).stem for path in out.splitlines()} == {*FIGURES}
    assert err.count(" is left out: model.target: ") == 2
    assert main(["plot", "a", "--only", "architecture"]) == 1


def test_runs_that_have_nothing_yet_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10])
    make(root, "b", [])
    assert main(["plot", "*"]) == 0
    assert capsys.readouterr().err == "note: no epoch is finished yet in b\n"


@pytest.mark.parametrize("arguments", [[], ["--terminal"]])
def test_where_none_has_anything_nothing_is_written(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    for number in range(7):
        make(root, f"r{number}", [])
    assert main(["plot", "r*", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no epoch is finished yet in r0, r1, r2, r3, r4 and 2 more" in err
    assert "HINT: python -m cifar_hpc status r0 r1 r2" in err
    assert not (root / "figures").exists()


def test_no_such_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "improved", [10])
    assert main(["plot", "improvde"]) == 2
    assert "did you mean 'improved'?" in capsys.readouterr().err


def test_out_that_is_a_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10])
    (root / "figures").touch()
    assert main(["plot", "a"]) == 2
    assert "--out: figures cannot be made: File exists; allowed: a folder." in capsys.readouterr().err


def test_a_damaged_spec_costs_the_architecture_only(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10]).spec.write_text("\x1b[31m: [")
    assert main(["plot", "a"]) == 0
    out, err = capsys.readouterr()
    assert [Path(path).stem for path in out.splitlines()][::2] == FIGURES
    assert "note: a: its spec cannot be read" in err
    assert "\x1b" not in err


def test_out_that_cannot_be_written_to_is_named_before_anything_is_drawn(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root, "a", [10])
    real = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "figures" and real(path, mode))
    assert main(["plot", "a"]) == 2
    assert "--out: the folder figures is not writable by you" in capsys.readouterr().err
    assert list((root / "figures").iterdir()) == []


def test_terminal_without_one_is_plain(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", [10, 20])
    assert main(["plot", "a", "--terminal"]) == 0
    out = capsys.readouterr().out
    assert "* test: 20.00 at epoch 2, best 20.00" in out
    assert "\x1b" not in out
    assert not (root / "figures").exists()


def in_a_terminal(*arguments: str, **environment: str) -> str:
    """What the command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    command = [sys.executable, "-m", "cifar_hpc", "plot", *arguments]
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    here = PROJECT
    done = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=here, env=variables)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # EIO: the other side is closed
        pass
    os.close(ours)
    assert done.wait(60) == 0
    return written.decode()


@pytest.mark.process
@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_has_colours_if_it_wants(root: Path, environment: dict[str, str], coloured: bool) -> None:
    make(root, "a", [10, 20])
    text = in_a_terminal("a", "--terminal", **environment)
    assert ("\x1b[38;5;74m" in text) is coloured
    assert "test: 20.00 at epoch 2" in text
