"""The table of runs: what is put together, what is left out, and its five forms."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from helpers import TINY

from cifar_hpc.__main__ import main
from cifar_hpc.cli.compare import FIGURES, TAKEN, all_columns, print_on_terminal
from cifar_hpc.config.io import from_plain, merge, nested
from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.logs import append_line
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points
from cifar_hpc.runs.results import Row, group_runs, read_rows, short_keys
from cifar_hpc.text import in_latex

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
ENVIRONMENT = {"device": "A100", "torch": "2.12.1", "cuda": "13.0", "cudnn": 9, "threads": None, "amp": "bf16"}
Make = Callable[..., RunPaths]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(run_queue, "queue", lambda *_: {})
    return tmp_path


def instant(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(root: Path) -> Make:
    """Writes the files of a run."""

    def run(name: str, accuracies: list[float], *, finished: bool = True, preempted: int = 0, **keys: Any) -> RunPaths:
        paths = RunPaths(root, name)
        paths.create()
        values: dict[str, Any] = merge(TINY, {"train": {"epochs": len(accuracies) + (not finished)}})
        for key, value in keys.items():
            values = merge(values, nested(key.replace("__", "."), value))
        freeze(paths, from_plain(values))
        rows = [
            {
                "epoch": epoch, "train_accuracy": accuracy - 10, "test_accuracy": accuracy, "epoch_seconds": 30.0,
                "world_size": 2, "shards": 4, "time": instant(60 * epoch),
            }
            for epoch, accuracy in enumerate(accuracies, 1)
        ]  # fmt: skip
        write_lines(paths.metrics, rows)
        start = {"world_size": 2, "environment": ENVIRONMENT, "machine": {"cifar_hpc": "0.1.0", "processor": "EPYC"}}
        events = [{"time": instant(0), "event": "submitted", "command": f"submit.py {name}"}]
        events.append({"time": instant(0), "event": "started", **start})
        for number in range(preempted):
            events.append({"time": instant(10 * number + 5), "event": "signal", "step": 1})
            events.append({"time": instant(10 * number + 5), "event": "requeued", "reason": "preemption"})
            events.append({"time": instant(10 * number + 10), "event": "resumed", **start})
        events += [{"time": instant(100), "event": "finished", "test_accuracy": accuracies[-1]}] if finished else []
        write_lines(paths.events, events)
        return paths

    return run


@pytest.fixture
def sweep(make: Make) -> None:
    """Dropout 0.1 and 0.3 with three seeds each, and 0.5 with one; one seed of 0.3 has not finished."""
    for seed, last in enumerate((90.0, 91.0, 93.0)):
        make(f"run-a{seed}", [50.0, 94.0, last], model__dropout=0.1, train__seed=seed, preempted=seed)
    make("run-b0", [50.0, 80.0, 95.0], model__dropout=0.3, train__seed=0)
    make("run-b1", [50.0, 80.0, 97.0], model__dropout=0.3, train__seed=1)
    make("run-b2", [10.0, 11.0], model__dropout=0.3, train__seed=2, finished=False)
    make("run-c0", [60.0, 70.0, 92.0], model__dropout=0.5, train__seed=0)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What compare prints into a pipe."""
    assert main(["compare", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("sweep")
def test_one_row_for_all_seeds_of_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "run-*").splitlines() == [
        "dropout  seeds        test %  best %  train %  epochs  training     wall  GPU-h     lost  restarts      state",
        "    0.1      3  91.33 ± 1.53   94.00    81.33     3/3   0:01:30  0:01:40  0.053  0:00:05  3 preemption  finished",  # noqa: E501
        "    0.3    2/3  96.00 ± 1.41   96.00    86.00   2-3/3   0:01:30  0:01:40  0.056  0:00:00  0             1 stopped",  # noqa: E501
        "    0.5      1  92.00          92.00    82.00     3/3   0:01:30  0:01:40  0.056  0:00:00  0             finished",  # noqa: E501
    ]


def test_points_of_a_sweep_are_in_its_order_unless_they_are_sorted(
    make: Make, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dropout in (0.1, 0.3, 0.5, 0.9):
        make(f"run-{dropout}", [50.0, 100 * dropout], model__dropout=dropout)
    for number, names in ((1, ["run-0.5", "run-0.1"]), (2, ["run-0.1", "run-0.3"])):  # the second has a new point
        sweep = SweepPaths(root, "run", number)
        sweep.create()
        write_points(sweep, names)
    order = ["0.5", "0.1", "0.3", "0.9"]
    assert [line.split()[0] for line in shown(capsys, "run-*").splitlines()[1:]] == order
    assert [line.split()[1] for line in shown(capsys, "run-*", "--each").splitlines()[1:]] == order
    for run in ("run-0.5", "run-0.1", "run-0.3"):
        event = {"event": "submitted", "scheduler": "local", "sweep": "logs/sweeps/run/2"}
        append_line(RunPaths(root, run).events, json.dumps(event))
    assert main(["status", "--json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [state["run"].removeprefix("run-") for state in states] == order
    assert [line.split()[0] for line in shown(capsys, "run-*", "--sort=dropout").splitlines()[1:]] == sorted(order)


@pytest.mark.usefixtures("sweep")
def test_differences_are_taken_seed_by_seed_with_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 95 - 90 and 97 - 91: the third seed of one has not finished. A single seed has no error."""
    lines = shown(capsys, "run-*", "--columns", "dropout,difference").splitlines()
    assert [line.split(maxsplit=1)[1].strip() for line in lines] == ["difference", "-", "+5.50 ± 0.50", "+2.00"]
    lines = shown(capsys, "run-*", "--columns", "dropout,difference", "--sort=-difference", "--markdown").splitlines()
    assert lines[0].endswith("| difference (± s.e.) |")
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["0.3", "0.5", "0.1"], "the first stays the reference"
    rows = json.loads(shown(capsys, "run-*", "--json"))["rows"]
    assert [row["difference"] and row["difference"]["mean"] for row in rows] == [None, 5.5, 2.0]
    records = list(csv.DictReader(io.StringIO(shown(capsys, "run-*", "--csv"))))
    assert [record["difference_mean"] for record in records] == ["", "5.5", "2.0"]


def test_peak_memory_is_that_of_the_rank_that_took_most(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("run", [50.0])
    shown(capsys, "run")  # writes progress.json
    found = json.loads(run.progress.read_text())
    run.progress.write_text(json.dumps(found | {"peak_memory_bytes": {"0": 1 << 30, "1": 3 << 29}}))
    (row,) = json.loads(shown(capsys, "run", "--json"))["rows"]
    assert row["peak_memory_bytes"] == {"mean": 3 << 29, "std": None, "count": 1}
    assert shown(capsys, "run", "--columns", "peak_memory_bytes").splitlines() == ["mem GiB", "   1.50"]
    assert "peak_memory_bytes_mean" in shown(capsys, "run", "--csv").splitlines()[0]


@pytest.mark.usefixtures("sweep")
def test_each_run_has_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "run-*", "--each", "--sort=-test_accuracy").splitlines()
    assert (
        lines[0].split()
        == "run dropout seed test % best % train % epochs training wall GPU-h lost restarts state".split()
    )
    assert lines[1].split() == "run-b1 0.3 1 97.00 97.00 87.00 3/3 0:01:30 0:01:40 0.056 0:00:00 0 finished".split()
    order = "run-b1 run-b0 run-a2 run-c0 run-a1 run-a0 run-b2".split()
    assert [line.split()[0] for line in lines[1:]] == order


@pytest.mark.usefixtures("sweep")
def test_json_is_in_full_and_not_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = json.loads(shown(capsys, "run-*", "--json"))["rows"]
    assert first["test_accuracy"] == {
        "mean": pytest.approx(274 / 3),
        "std": pytest.approx(stdev([90, 91, 93])),
        "count": 3,
    }
    assert (first["runs"], first["seeds"]) == (["run-a0", "run-a1", "run-a2"], [0, 1, 2])
    assert (first["changed"], first["restarts"]) == ({"model.dropout": 0.1}, {"preemption": 3})
    assert second["counted"] == ["run-b0", "run-b1"]
    assert [member["state"] for member in second["members"]] == ["finished", "finished", "stopped"]
    assert third["test_accuracy"]["std"] is None
    assert third["members"] == [
        {
            "name": "run-c0", "state": "finished", "epoch": 3, "epochs": 3,
            "test_accuracy": 92.0, "best_accuracy": 92.0, "train_accuracy": 82.0,
            "training_seconds": 90.0, "wall_seconds": 100.0, "restarts": {}, "world_sizes": [2],
            "shards": 4, "date": "2026-01-01T00:03:00.000Z", "hardware": ["2 × A100"],
            "versions": ["cifar_hpc 0.1.0, torch 2.12.1, cuda 13.0, cudnn 9, bf16"], "command": "submit.py run-c0",
            "device_seconds": 200.0, "lost_seconds": 0, "device": "gpu",
            "peak_memory_bytes": None,
        }
    ]  # fmt: skip


@pytest.mark.usefixtures("sweep")
def test_csv_is_for_spreadsheets(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "run-*", "--csv")
    first, second, third = csv.DictReader(io.StringIO(text, newline=""))
    assert text.count("\r\n") == 4
    assert first["model.dropout"] == "0.1"
    assert float(first["test_accuracy_mean"]) == pytest.approx(274 / 3)
    assert float(first["test_accuracy_std"]) == pytest.approx(stdev([90, 91, 93]))
    assert (second["finished"], second["state"], second["epochs_done"]) == ("2", "1 stopped", "3; 2")
    assert (third["test_accuracy_std"], third["hardware"], third["restarts"]) == ("", "2 × A100", "0")
    assert third["data"] == "synthetic, 264 training images, 100 test images"
    assert not any(key is None or value is None for row in (first, second, third) for key, value in row.items())


def test_images_held_out_are_no_training_images(make: Make) -> None:
    (row,) = read_rows(group_runs([make("run", [50.0], data__test_size=None, data__holdout=64)]), {})
    assert row.data == "synthetic, 200 training images, evaluated on 64 training images held out"


@pytest.mark.usefixtures("sweep")
def test_markdown_says_how_each_row_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    head, rule, first, *rest = shown(capsys, "run-*", "--markdown", "--sort=-restarts").splitlines()
    cells = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert rule.startswith("| ---: | ---: | ---: |")
    assert cells["| `model.dropout`"] == "| 0.1"
    assert cells["test accuracy (%)"] == "91.33 ± 1.53"
    assert cells["GPU-hours"] == "0.053"
    below = "\n".join(rest).partition("\n\n")[2]
    assert "- hardware: 2 × A100\n- versions: cifar\\_hpc 0.1.0, torch 2.12.1, cuda 13.0, cudnn 9, bf16\n" in below
    assert (
        "- date: 2026-01-01\n- command:\n  - dropout 0.1: `submit.py run-a0; submit.py run-a1; submit.py run-a2`\n"
        in below
    )
    assert "- runs:\n  - dropout 0.1: `run-a0; run-a1; run-a2`\n  - dropout 0.3: `run-b0; run-b1; run-b2`\n" in below


@pytest.mark.usefixtures("sweep")
def test_what_all_rows_of_a_document_share_is_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "run-a0", "run-c0", "--markdown")
    assert text.splitlines()[0].startswith("| `model.dropout` | test accuracy (%) | best (%) | ")
    assert "\n- in each row: seeds 1, epochs 3/3, restarts 0\n" in text
    asked = shown(capsys, "run-a0", "run-c0", "--markdown", "--columns", "epochs,dropout,hardware")
    assert asked.splitlines()[2:4] == ["| 3/3 | 0.1 | 2 × A100 |", "| 3/3 | 0.5 | 2 × A100 |"]
    assert "- hardware" not in asked


@pytest.mark.usefixtures("sweep")
def test_columns_are_chosen_and_in_the_order_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "run-*", "--columns", "test_accuracy,dropout,runs").splitlines()
    assert [line[:12].strip() for line in lines] == ["test %", "91.33 ± 1.53", "96.00 ± 1.41", "92.00"]
    assert lines[3].split() == ["92.00", "0.5", "run-c0"]
    assert main(["compare", "run-*", "--columns", "test_accuracy,hardwear"]) == 2
    error = capsys.readouterr().err
    assert "--columns: 'hardwear' is no column; allowed: model.dropout, seeds," in error
    assert "did you mean 'hardware'?" in error
    for form in ("--json", "--csv"):
        assert main(["compare", "run-*", "--columns", "run", form]) == 2
        assert f"--columns: {form} always has all" in capsys.readouterr().err


def test_a_tabular_for_a_paper(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, last in enumerate((90.0, 91.0)):
        make(f"a_{seed}", [last], model__activation="leaky_relu", train__seed=seed)
    make("b", [92.0], model__activation="relu")
    text = shown(capsys, "*", "--latex", "--columns", "activation,test_accuracy,runs,command")
    assert text.splitlines()[:8] == [
        r"\begin{tabular}{lrll}",
        r"\toprule",
        r"activation & test accuracy (\%) & runs & command \\",
        r"\midrule",
        r"leaky\_relu & 90.50 $\pm$ 0.71 & a\_0; a\_1 & submit.py a\_0; submit.py a\_1 \\",
        r"relu & 92.00 & b & submit.py b \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert all(line.startswith("% ") for line in text.splitlines()[8:])


def test_no_character_means_anything_to_latex() -> None:
    assert in_latex("a\\b{c}_%&#$^~<|>") == (
        r"a\textbackslash{}b\{c\}\_\%\&\#\$\textasciicircum{}\textasciitilde{}\textless{}\textbar{}\textgreater{}"
    )
    assert in_latex("2 × 3 ± 1\n--set") == r"2 $\times$ 3 $\pm$ 1 -{}-set"


def test_two_runs_of_one_seed_are_one_observation(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("one", [43.4, 43.4])
    make("two", [43.4, 43.4])
    make("three", [44.4, 45.4], train__seed=1)
    make("late", [10.0], finished=False)
    assert main(["compare", "one", "two", "--json"]) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert row["test_accuracy"] == {"mean": 43.4, "std": None, "count": 1}
    assert (row["distinct_seeds"], row["counted"], row["ambiguous_seeds"]) == (1, ["one"], [])
    assert captured.err == ""
    line = shown(capsys, "one", "two").splitlines()[1]
    assert "  1 (2 runs)   43.40   43.40" in line and "±" not in line
    # A run of the same seed that has not finished counts only where none has.
    assert " 1 (2 runs) " in (line := shown(capsys, "one", "late").splitlines()[1]) and " 43.40 " in line
    (row,) = json.loads(shown(capsys, "two", "three", "one", "--json"))["rows"]
    assert row["test_accuracy"]["count"] == 2
    assert row["test_accuracy"]["mean"] == pytest.approx((43.4 + 45.4) / 2)
    assert row["test_accuracy"]["std"] == pytest.approx(stdev([43.4, 45.4]))


def test_runs_of_one_seed_with_other_results_are_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("one", [43.4], train__seed=7)
    make("two", [43.6], train__seed=7)
    assert main(["compare", "*"]) == 0
    assert "warning: one: runs of seed 7 have different results (other hardware?)" in capsys.readouterr().err


def test_a_submission_again_is_called_so_as_in_show(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("run", [80.0])
    first, start, end = run.events.read_text().splitlines()
    run.events.write_text("\n".join([first, start, first, start.replace("started", "resumed"), end]) + "\n")
    assert shown(capsys, "run", "--columns", "restarts").splitlines()[-1].strip() == "1 submitted again"


def test_hours_are_of_the_device(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("gpu", [80.0], preempted=1)
    (row,) = json.loads(shown(capsys, "gpu", "--json"))["rows"]
    # Two processes, for 5 s and for 90 s; from the requeue to the next start 5 s.
    assert (row["device_seconds"]["mean"], row["lost_seconds"]["mean"]) == (190.0, 5.0)
    assert shown(capsys, "gpu", "--columns", "device_seconds").split() == ["GPU-h", "0.053"]
    slow = make("slow", [80.0])
    started = '"event": "started"'
    slow.events.write_text(slow.events.read_text().replace(started, started + ', "startup": {"total": 20}'))
    (row,) = json.loads(shown(capsys, "slow", "--json"))["rows"]
    assert row["device_seconds"]["mean"] == 2 * (100.0 + 20.0), "starting takes the GPUs, too"
    cpu = make("cpu", [80.0])
    cpu.events.write_text(cpu.events.read_text().replace('"threads": null', '"threads": 1'))
    assert shown(capsys, "cpu", "--columns", "device_seconds").split() == ["device-h", "0.056"]
    assert "GPU" not in shown(capsys, "cpu", "--markdown")


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("test_accuracy", "0.1 0.5 0.3"), ("test", "0.1 0.5 0.3"), ("-test_accuracy", "0.3 0.5 0.1"),
        ("-dropout", "0.5 0.3 0.1"), ("model.dropout", "0.1 0.3 0.5"), ("-seeds", "0.1 0.3 0.5"),
        ("epochs", "0.3 0.1 0.5"), ("state", "0.3 0.1 0.5"),
    ],
)  # fmt: skip
def test_rows_are_sorted_by_any_column(capsys: pytest.CaptureFixture[str], by: str, order: str) -> None:
    lines = shown(capsys, "run-*", f"--sort={by}").splitlines()
    assert [line.split()[0] for line in lines[1:]] == order.split()


def test_what_is_missing_comes_last_in_both_directions(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("low", [10.0], model__dropout=0.1)
    make("high", [90.0], model__dropout=0.2)
    (make("none", [50.0], model__dropout=0.3, finished=False).metrics).unlink()
    for by, order in (("test", ["0.1", "0.2", "0.3"]), ("-test", ["0.2", "0.1", "0.3"])):
        lines = shown(capsys, "*", f"--sort={by}").splitlines()
        assert [line.split()[0] for line in lines[1:]] == order
    assert lines[-1].split() == "0.3 2 0/1 - - - 0/2 - - 0.000 - stopped".split()


@pytest.mark.usefixtures("sweep")
def test_an_unknown_column_is_answered_with_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "run-*", "--sort=-test_acuracy"]) == 2
    error = capsys.readouterr().err
    assert "--sort: 'test_acuracy' is no column; allowed: model.dropout, seeds, test_accuracy, " in error
    assert "did you mean 'test_accuracy'?" in error


def test_an_unknown_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nothing-*"]) == 2
    assert "nothing-*" in capsys.readouterr().err


def test_one_run_is_named(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("only", [80.0])
    lines = shown(capsys, "only").splitlines()
    assert lines[1].split()[:3] == ["only", "1", "80.00"]


def test_world_sizes_are_shown_where_they_differ(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("one", [80.0], model__dropout=0.1)
    moved = make("two", [80.0, 81.0], model__dropout=0.3)
    assert " ranks" not in shown(capsys, "*")
    moved.metrics.write_text(moved.metrics.read_text().replace('"world_size": 2', '"world_size": 1', 1))
    lines = shown(capsys, "*").splitlines()
    assert lines[0].endswith("restarts  ranks")
    assert [line.split()[-1] for line in lines[1:]] == ["2", "2"]
    assert lines[2].endswith("1, 2")


def on_terminal(root: Path, capsys: pytest.CaptureFixture[str], width: int) -> tuple[list[Row], str]:
    """All runs as rows, and their table, which keeps within `width` characters."""
    rows = read_rows(group_runs([RunPaths(root, p.name) for p in sorted((root / "logs").iterdir())]), {})
    print_on_terminal([column for column in all_columns(rows, each=False) if column.shown])
    text = capsys.readouterr().out
    assert all(len(line) <= width for line in text.splitlines())
    return rows, text


@pytest.fixture
def elements(make: Make) -> None:
    """Runs that differ in six keys, most of them as most others."""
    make("base", [70.0])
    make("nesterov", [73.0], optimizer__nesterov=True)
    make("average", [72.0], lookahead__enabled=False, ema__decay=0.99)
    make("trivial", [60.0], augment__trivial=True)
    make("mixed", [50.0], mixing__mixup=0.2, mixing__cutmix=1.0)


@pytest.mark.usefixtures("elements")
def test_many_keys_are_one_column_of_what_is_not_as_in_most(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "*", "--sort=-test_accuracy").splitlines()
    assert lines[0].split()[:3] == ["settings", "seeds", "test"]
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        "optimizer.nesterov=true",
        "lookahead.enabled=false ema.decay=0.99",
        "base",
        "augment.trivial=true",
        "mixing.mixup=0.2 mixing.cutmix=1",
    ]
    assert lines[-1] == (
        "base: optimizer.nesterov=false lookahead.enabled=true ema.decay=null augment.trivial=false mixing.mixup=0 "
        "mixing.cutmix=0"
    )
    by_key = shown(capsys, "*", "--sort=-mixing.mixup").splitlines()
    assert by_key[1].startswith("mixing.mixup=0.2")
    differences = shown(capsys, "*", "--sort=-difference", "--columns", "difference").splitlines()[1:-1]
    assert [line.strip() for line in differences] == ["+3.00", "+2.00", "-10.00", "-20.00", "-"], "to the base"
    assert "| settings | test accuracy (%) |" in shown(capsys, "*", "--markdown").splitlines()[0]
    assert "optimizer.nesterov,lookahead.enabled,ema.decay," in shown(capsys, "*", "--csv").splitlines()[0]


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("width", [60, 80, 200])
def test_settings_are_broken_on_a_narrow_terminal(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, text = on_terminal(root, capsys, width)
    assert "lookahead.enabled=false" in text and "ema.decay=0.99" in text and "73.00" in text


def test_keys_are_shortened_where_nothing_else_has_that_name() -> None:
    keys = ["model.dropout", "optimizer.name", "schedule.name", "train.epochs"]
    assert list(short_keys(keys, TAKEN).values()) == ["dropout", "optimizer", "schedule", "train.epochs"]


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal_shows_what_it_has_room_for(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows, text = on_terminal(root, capsys, width)
    header = text.splitlines()[0]
    for column in all_columns(rows, each=False):
        if not column.shown:
            continue
        note = " ".join(text.partition("no room for: ")[2].split())
        assert (column.heading in header) != (column.heading in note.partition(";")[0].split(", ")), column.name
    assert ("wall" in header) == (width == 160)
    assert {"dropout", "seeds", "test", "state"} <= set(header.split())
    assert "96.00 ± 1.41" in text


def test_damaged_and_hostile_files_end_nothing(make: Make, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("good", [80.0], model__dropout=0.1)
    for name, value in (("text", "x\x1b[31m"), ("list", [1]), ("huge", 10**400), ("true", True), ("nan", math.nan)):
        run = make(name, [80.0, 81.0], model__dropout=0.3)
        row = dict.fromkeys(json.loads(run.metrics.read_text().splitlines()[0]), value)
        event = dict.fromkeys(("time", "world_size", "environment", "machine", "command"), value) | {"event": "resumed"}
        for path, bad in (
            (run.metrics, [row, row | {"epoch": 3}]),
            (run.events, [event, event | {"environment": row}]),
        ):
            with path.open("a") as file:
                file.write("\0half a line\n" + "".join(json.dumps(line) + "\n" for line in bad))
    for name, text in (("broken", "model: {dropout: \x1b}"), ("foreign", "a: 1"), ("empty", "")):
        run = RunPaths(root, name)
        run.create()
        run.spec.write_text(text)
    for form in ([], ["--json"], ["--csv"], ["--markdown"], ["--each"], ["--sort=wall_seconds"], ["--sort=-dropout"]):
        assert main(["compare", "*", *form]) == 0
        out, error = capsys.readouterr()
        assert "\x1b" not in out + error
        assert "broken" in out
        assert "warning: broken: " in error
        assert "Traceback" not in error


def test_text_for_a_document_cannot_break_its_table(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("odd", [80.0])
    run.events.write_text(run.events.read_text().replace("submit.py odd", "a | b\\n<img> =1+1"))
    lines = shown(capsys, "odd", "--markdown").splitlines()
    assert "- command: `a | b <img> =1+1`" in lines
    assert len(re.findall(r"(?<!\\)\|", lines[0])) == len(re.findall(r"(?<!\\)\|", lines[2]))


@pytest.mark.usefixtures("sweep")
def test_a_slurm_that_does_not_answer_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any) -> None:
        raise SchedulerError("squeue: no answer")

    monkeypatch.setattr(run_queue, "queue", silent)
    assert main(["compare", "run-*"]) == 0
    out, error = capsys.readouterr()
    assert "96.00 ± 1.41" in out
    assert "squeue: no answer" in error


def test_figures_name_fields_of_a_result(make: Make, root: Path) -> None:
    (row,) = read_rows(group_runs([make("run", [80.0, 70.0])]), {})
    assert [round(figure.mean, 2) for name in FIGURES if (figure := row.figure(name))] == [
        70.0,
        80.0,
        60.0,
        60.0,
        100.0,
        200.0,
        0.0,
    ]
