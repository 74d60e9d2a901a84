"""The GPU benchmark, rehearsed on the CPU: it is to fail for no silly reason on the day that there is a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_parts, gpu_runs, gpu_speed
from benchmarks.gpu import Report
from benchmarks.gpu_bench import (
    RATE_TARGETS,
    TRAINING_TARGETS,
    Bench,
    Steps,
    figure,
    read_switches,
    same,
    set_switches,
    target_of,
)
from benchmarks.measure import ROOT
from cifar_hpc.config.io import from_plain
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.process import is_running


@pytest.fixture(autouse=True)
def kept_switches() -> Iterator[None]:
    switches = read_switches()
    yield
    set_switches(*switches)


QUICK = Bench(torch.device("cpu"), quick=True)
LEFT_OUT = {"resume", "tests"}  # nine starts of cifar_hpc; pytest within pytest


@pytest.mark.process
@pytest.mark.parametrize("call", gpu.CALLS)
def test_rehearsal(call: str, tmp_path: Path) -> None:
    """As on a GPU, without packages that may be missing there."""
    environment = {k: v for k, v in os.environ.items() if k != "OUT"}
    pieces = [name for name in gpu.CALLS[call] if name not in LEFT_OUT]
    command = [str(ROOT / "benchmarks/gpu.sh"), call, "--device", "cpu", "--quick", "--out", str(tmp_path)]
    command += ["--only", ",".join(pieces), "--limit", "900"]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('submitit', 'pytest', 'lightning', 'pytorch_lightning')))"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(blocked)
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "site"), **nursery.THREADS}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "gpu.log").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(name, piece["status"]) for name, piece in found["pieces"].items()] == [(p, "done") for p in pieces]
    assert found["environment"]["torch"] == str(torch.__version__)
    assert all(piece["rows"] or piece["text"] for piece in found["pieces"].values())
    checks = [row for piece in found["pieces"].values() for row in piece["rows"] if row["target"] == "<= 0"]
    assert checks and all(row["met"] for row in checks)
    assert "mean nothing" in ended.stdout and ended.stdout.strip() == (tmp_path / "gpu.md").read_text().strip()


def test_every_piece_is_a_function() -> None:
    for call, pieces in gpu.CALLS.items():
        assert gpu.LIMIT_SECONDS[call] <= 270
        for name, module in pieces.items():
            assert callable(getattr(__import__(f"benchmarks.{module}", fromlist=["x"]), name)), name


def test_an_unknown_piece_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu._options(["first", "--only", "rates,peers"])
    assert "--only peers: allowed for first: warm_up, ceilings" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- pieces that fail

CHILD = """
import os, signal, subprocess, sys
from pathlib import Path
from benchmarks.gpu import Report, run_all
from benchmarks.measure import Row
folder = Path(sys.argv[1])

def good(bench, report):
    report.add(Row("gpu", "speed", "img/s", [42.0] * 3))

def bad(bench, report):
    report.add(Row("gpu", "of the one that fails", "", [1.0] * 3), text="a paragraph")
    if sys.argv[2] == "dies":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "hanging").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    signal.pause()

run_all({"good": good, "bad": bad, "never": good}, None, Report(folder, False, ["good", "bad", "never"]), lambda: None)
"""


class Patient(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose time is over as soon as it hangs."""

    folder: Path

    def wait(self, timeout: float | None = None) -> int:
        while timeout is not None and self.poll() is None:
            if (self.folder / "hanging").exists() and (self.folder / "hanging").read_text():
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return super().wait()


@pytest.mark.process
@pytest.mark.parametrize(
    ("how", "words"),
    [("dies", "the process ended with status -9: the last words"), ("hangs", "ended at the limit of 270 s")],
)
def test_what_was_found_before_the_process_died_or_hung_is_kept(
    how: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patient, "folder", tmp_path, raising=False)
    monkeypatch.setattr(gpu.subprocess, "Popen", Patient)
    problem = gpu.watch(
        [sys.executable, "-c", CHILD, str(tmp_path), how], gpu._options(["first", "--out", str(tmp_path)])
    )
    assert problem == words
    assert gpu.close(tmp_path, problem) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["problem"] == words
    assert [piece["status"] for piece in found["pieces"].values()] == ["done", "running", "not reached"]
    assert [row["what"] for row in found["pieces"]["bad"]["rows"]] == ["of the one that fails"]
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith(f"THIS CALL CAME TO NO END: {words}\n")
    assert "42 img/s" in page and "a paragraph" in page and "- bad: running" in page
    if how == "hangs":
        assert not is_running(int((tmp_path / "hanging").read_text()))


def pieces_of(*bodies: Callable[[], object]) -> dict[str, Callable[[Any, Report], Any]]:
    return {f"piece {number}": lambda bench, report, body=body: body() for number, body in enumerate(bodies)}


def fail() -> None:
    raise ValueError("no such thing\nand more")


def outcomes_of(pieces: dict[str, Any], folder: Path, settle: Callable[[], None]) -> list[tuple[str, str]]:
    """Status and error of each piece, as they were written."""
    gpu.run_all(pieces, None, Report(folder, True, list(pieces)), settle)
    found = json.loads((folder / "gpu.json").read_text())["pieces"]
    return [(piece["status"], piece["error"]) for piece in found.values()]


def test_a_piece_that_fails_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pieces = pieces_of(fail, lambda: print("what a piece prints goes into the log"))
    assert outcomes_of(pieces, tmp_path, lambda: None) == [("failed", "ValueError: no such thing"), ("done", "")]
    assert "no such thing\nand more" in (errors := capfd.readouterr().err)
    assert "into the log" in errors


@pytest.mark.parametrize(
    ("body", "words"),
    [(fail, "ValueError: no such thing"), (bool, "CUDA error: an illegal memory access was encountered")],
)
def test_an_error_of_cuda_itself_stops_the_rest(body: Callable[[], object], words: str, tmp_path: Path) -> None:
    """The second is noticed only after the piece."""
    problems = iter(("", "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"))

    def settle() -> None:
        if problem := next(problems):
            raise RuntimeError(problem)

    told = f"CUDA itself has failed, so nothing is run after this: {words}"
    found = outcomes_of(pieces_of(bool, body, bool), tmp_path, settle)
    assert found == [("done", ""), ("failed", told), ("not reached", "")]
    assert gpu.close(tmp_path, "") == 1 and told in (tmp_path / "gpu.md").read_text()


# ------------------------------------------------------------------------------------------- targets, tests, processes


@pytest.mark.parametrize(
    ("gpu_name", "rate", "minutes"),
    [("NVIDIA H200", ">= 30000 img/s", "< 14 min"), ("NVIDIA H100 80GB HBM3", ">= 24000 img/s", ""),
     ("NVIDIA A100-SXM4-80GB", "", ""), ("", "", "")],
)  # fmt: skip
def test_targets_go_by_the_gpus_name(gpu_name: str, rate: str, minutes: str) -> None:
    assert target_of(RATE_TARGETS, gpu_name) == rate
    assert target_of(TRAINING_TARGETS, gpu_name) == minutes
    assert figure("step", "img/s", [29_900], rate).met is (None if not rate else "H100" in gpu_name)


def test_every_test_that_needs_a_gpu_is_run_there(request: pytest.FixtureRequest) -> None:
    files = gpu_checks.files_with_gpu_tests()
    assert {"tests/data/test_augment.py", "tests/data/test_mixing.py", "tests/test_randomness.py"} <= {*files}
    for item in request.session.items:  # all of them, where all are run
        marked = item.get_closest_marker("gpu") is not None
        assert not marked or str(item.path.relative_to(ROOT)) in files, item.nodeid
    asks = re.compile(r"torch\.cuda\.is_available\(\)")
    asking = [path.name for path in (ROOT / "tests").rglob("*.py") if asks.search(path.read_text())]
    assert asking == ["conftest.py"]  # which skips those with the marker


def test_runs_find_packages_where_they_were_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_runs.Run(tmp_path, "run", {})
    monkeypatch.setenv("PYTHONPATH", f"/some/site{os.pathsep}/other")
    assert run.environment()["PYTHONPATH"] == os.pathsep.join((str(ROOT), "/some/site", "/other"))
    monkeypatch.delenv("PYTHONPATH")
    assert run.environment()["PYTHONPATH"] == str(ROOT)


# ------------------------------------------------------------------------------------------- arithmetic


def test_kernels_stand_by_their_time() -> None:
    lines = gpu_parts.kernel_table({"short": (3, 10.0), "a|b": (0.5, 30.0)}).splitlines()
    assert lines[2:] == ["| `a/b` | 0.5 | 30.0 | 75.0 % |", "| `short` | 3 | 10.0 | 25.0 % |"]
    assert len(gpu_parts.kernel_table({}).splitlines()) == 2


def test_an_epoch_is_cut_into_its_parts() -> None:
    spans: gpu_runs.Spans = {
        "step": [(1, 2), (7, 8), (12, 13), (15, 16), (20, 21), (24, 25)],
        "evaluate": [(9, 11), (16.5, 18), (25, 28)],
        "save": [(11, 12), (14, 15), (18, 18.5)],
        "train": [(-1, 30)],
    }
    assert gpu_runs.epochs_of(spans) == {
        "whole": [8, 10], "steps": [4.5, 5], "evaluation": [1.5, 3], "checkpoints": [1.5, 0],
    }  # fmt: skip


def test_peers_have_pytorchs_own_switches_in_all_of_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.device("cpu"), quick=True)
    bench.switches = (False, True, True, True, 2)  # unlike those of an engine
    steps = 0

    def train(data: object, folder: Path, turns: gpu_speed.Turns, **_: object) -> None:
        nonlocal steps
        while steps < 10_000:
            steps += 1
            time.sleep(0.001)
            turns()
            assert read_switches() == bench.switches

    monkeypatch.setattr("benchmarks.peers.naive.train", train)
    turns = gpu_speed.race(bench, "naive", 16, 1, ("off",))
    assert len(turns.ours["off"]) == len(turns.theirs) == bench.repetitions
    assert 4 * bench.repetitions < steps < 10_000
    assert all(rate <= 16 / 0.001 for rate in turns.theirs), "steps that were not timed were counted"
    bench.configure(from_plain(bench.plain_spec(16)))
    assert read_switches() == (True, False, False, False, 1)


def test_steps_are_those_of_the_training_loop() -> None:
    engine = QUICK.engine(100, images=250)
    taken: list[tuple[int, int, int, list[int]]] = []
    engine.step = lambda *place_and_order: taken.append(place_and_order)  # type: ignore[assignment]
    Steps(QUICK, engine).take(4)
    assert [place for *place, _ in taken] == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [1, 0, 3]]  # the third is of 50 images
    orders = [order for *_, order in taken]
    assert orders[0] is orders[2] and not torch.equal(orders[0], orders[3])


@pytest.mark.parametrize("waiting", [True, False])
def test_what_waits_for_the_device_is_counted_and_found(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, modes = Bench(torch.device("cpu"), quick=True), ["default"]
    bench.cuda, engine = True, bench.engine(16)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def loss_sum(*arguments: torch.Tensor) -> torch.Tensor:  # called in each step
        if waiting and modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)
        if waiting and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return Engine.loss_sum(engine, *arguments)

    engine.loss_sum = loss_sum  # type: ignore[method-assign, assignment]
    count, place = gpu_checks.waits(bench, engine)
    assert count == (gpu_checks.STEPS if waiting else 0)
    assert re.fullmatch(r"first at engine\.py:[0-9]+" if waiting else "", place)
    assert modes[-1] == "default"


def test_states_are_compared_bit_by_bit() -> None:
    one, again, other = (QUICK.engine(16, seed=seed) for seed in (0, 0, 1))
    equal, different = same("twice", one, again), same("seeds", one, other)
    assert (equal.what, equal.ours[1], equal.met) == ("twice: tensors that differ", 0, True)
    assert equal.note.startswith("of ") and " and " not in equal.note
    assert different.ours[1] > 10 and different.met is False and " and " in different.note
    again.bad_step.fill_(7)
    assert same("bad step", one, again).ours[1] == 1
