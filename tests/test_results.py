"""RESULTS.md's tables are what `compare` makes of the logs that are kept in results/."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
from helpers import PROJECT

from cifar_hpc.__main__ import main
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import find_runs
from cifar_hpc.runs.results import group_runs, read_rows, settings

BEGIN = "CIFAR_HPC_ROOT=results python -m cifar_hpc compare "
COMMANDS = [
    line.removeprefix(BEGIN)
    for line in (PROJECT / "results" / "README.md").read_text().splitlines()
    if line.startswith(BEGIN)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_is_made_from_the_logs(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(PROJECT / "results"))
    monkeypatch.setattr(run_queue, "queue", lambda *_: {})
    assert main(["compare", *shlex.split(command)]) == 0
    table, remarks, note = capsys.readouterr().out.split("\n\n")
    assert len(table.splitlines()) > 2
    text = (PROJECT / "RESULTS.md").read_text()
    assert table in text and note in text
    # What several tables have in common stands below one of them.
    assert len(remarks.splitlines()) >= 5
    assert set(remarks.splitlines()) <= set(text.splitlines())


def test_what_the_sweep_shows_is_beyond_the_noise_of_all_its_rows() -> None:
    """A difference is shown where it is beyond 5 % of a t-test with Bonferroni's correction.

    Its standard error is that of the residuals of rows and seeds, so of (rows - 1)(seeds - 1) degrees of freedom; of
    the rows within 5 points of the base, as the others are noisier.
    """
    groups = group_runs(find_runs(PROJECT / "results", ["fast_elements-*"]))
    rows = dict(zip(settings(groups), read_rows(groups, {}), strict=True))
    differences = {name: figure.mean for name, row in rows.items() if (figure := row.figure("difference"))}
    near = [row for name, row in rows.items() if abs(differences.get(name, 0.0)) < 5]
    accuracy = np.array([[member.test_accuracy for member in row.members] for row in near])
    rest = accuracy - accuracy.mean(0) - accuracy.mean(1, keepdims=True) + accuracy.mean()
    count, seeds = accuracy.shape
    error = np.sqrt(2 / seeds * (rest**2).sum() / ((count - 1) * (seeds - 1)))
    text = (PROJECT / "RESULTS.md").read_text()
    (said,) = re.findall(
        r"of (\d+) degrees of freedom: ([\d.]+) points.* for (\d+) rows.* is ([\d.]+) times", " ".join(text.split())
    )
    assert said[:3] == (f"{(count - 1) * (seeds - 1)}", f"{error:.2f}", f"{len(differences)}")
    shown = {name for name, difference in differences.items() if abs(difference) > float(said[3]) * error}
    assert set(re.findall("`(.*?)`", re.findall(r"^- \*\*Shown\*\*: (.*)$", text, re.MULTILINE)[0])) == shown


def test_each_run_is_in_a_table_and_says_nothing_of_its_machines_folders() -> None:
    text = (PROJECT / "RESULTS.md").read_text().replace("\\", "")
    for logs in sorted((PROJECT / "results" / "logs").iterdir()):
        assert re.search(rf"(?<![\w-]){re.escape(logs.name)}(?![\w-])", text), logs.name
        for path in logs.iterdir():
            assert re.search(r'[" =](/[a-z]+){2}', path.read_text()) is None, path


def test_each_run_has_finished_and_has_each_epoch_once() -> None:
    for logs in sorted((PROJECT / "results" / "logs").iterdir()):
        rows, events = read_jsonl(logs / "metrics.jsonl"), read_jsonl(logs / "events.jsonl")
        assert events[-1]["event"] == "finished"
        assert [row["epoch"] for row in rows] == list(range(1, events[-1]["epoch"] + 1)), logs.name
