"""Finding runs by name and by pattern."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cifar_hpc.errors import SpecError
from cifar_hpc.runs.paths import RunPaths, SweepPaths, find_runs, is_pattern, sweep_order, write_points


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs, and a folder that is none."""
    for name in ("dropout-1", "dropout-2", "wide-1", "sweeps"):
        run = RunPaths(tmp_path, name)
        run.create()
        run.spec.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["wide-1"], ["wide-1"]),
        (["wide-1", "dropout-2"], ["dropout-2", "wide-1"]),
        (["dropout-*"], ["dropout-1", "dropout-2"]),
        (["*-1", "dropout-?", "wide-1"], ["dropout-1", "dropout-2", "wide-1"]),
        (["[dw]*-[!2]"], ["dropout-1", "wide-1"]),
        (["*"], ["dropout-1", "dropout-2", "wide-1"]),
        ([], []),
        (["wide"], ["wide-1"]),  # the only one that begins so
        (["dropout-2", "w"], ["dropout-2", "wide-1"]),
    ],
)
def test_runs_are_found_once_and_by_name(root: Path, patterns: list[str], found: list[str]) -> None:
    assert [run.name for run in find_runs(root, patterns)] == found


@pytest.mark.parametrize("pattern", ["drpout-1", "x*", "[", "../*", "sweeps", "", "."])
def test_a_pattern_without_a_run_is_an_error_that_names_it(root: Path, pattern: str) -> None:
    with pytest.raises(SpecError, match=r"no such run under .*; there are: dropout-1, dropout-2, wide-1"):
        find_runs(root, ["wide-1", pattern])


def test_a_beginning_of_several_runs_is_an_error_that_lists_them(root: Path) -> None:
    with pytest.raises(SpecError, match=r"^dropout: 2 runs begin so: dropout-1, dropout-2\. HINT: .*'dropout\*'"):
        find_runs(root, ["dropout"])


def test_the_exact_name_wins(root: Path) -> None:
    for name in ("dropout", "dropout-10"):
        (root / "logs" / name).mkdir()
        (root / "logs" / name / "spec.yaml").touch()
    assert [run.name for run in find_runs(root, ["dropout", "dropout-1"])] == ["dropout", "dropout-1"]


def test_the_nearest_name_is_offered(root: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'dropout-1'"):
        find_runs(root, ["drpout-1"])


def test_a_run_of_which_only_checkpoints_are_left_is_found_by_its_name(root: Path) -> None:
    (root / "checkpoints" / "old").mkdir()
    assert [run.name for run in find_runs(root, ["old"])] == ["old"]


def test_patterns_are_told_from_names() -> None:
    assert is_pattern("a*") and is_pattern("a?") and is_pattern("[a]") and not is_pattern("improved_resnet-1a2b3c4d")


def test_a_copy_of_a_submission_that_a_user_keeps_is_no_submission(root: Path) -> None:
    for number, points in ((1, ["wide-1"]), (2, ["wide-1", "dropout-1"])):
        sweep = SweepPaths(root, "mine", number)
        sweep.create()
        write_points(sweep, points)
    shutil.copytree(SweepPaths(root, "mine", 2).logs, root / "logs" / "sweeps" / "mine" / "2.bak")
    assert sweep_order(root) == {"wide-1": ("mine", 0), "dropout-1": ("mine", 1)}
