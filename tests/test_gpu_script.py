"""The GPU benchmark, rehearsed on the CPU: it is to fail for no silly reason on the day that there is a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch

from benchmarks import gpu, gpu_bench, gpu_parts, gpu_speed
from benchmarks.gpu_bench import Bench, Report, Steps
from benchmarks.measure import ROOT

QUICK = Bench(torch.device("cpu"), quick=True)


def options(folder: Path, *words: str) -> Namespace:
    return gpu._options(["--device", "cpu", "--quick", "--out", str(folder), *words])


@pytest.mark.process
def test_rehearsal(tmp_path: Path) -> None:
    """Two pieces, each in a process of its own, as on a GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "CIFAR_HPC_TEST_IMAGES")}
    pieces = ["no_syncs", "peers"]
    command = [str(ROOT / "benchmarks/gpu.sh"), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--only", ",".join(pieces)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "gpu.log").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(name, piece["status"]) for name, piece in found["pieces"].items()] == [(p, "done") for p in pieces]
    assert found["environment"]["torch"] == str(torch.__version__)
    assert "mean nothing" in ended.stdout
    assert "naive, 2 workers" in (tmp_path / "gpu.md").read_text()


def rehearse(name: str, folder: Path) -> None:
    report = Report(folder / f"{name}.json")
    report.add()
    getattr(importlib.import_module(f"benchmarks.{gpu.PIECES[name][0]}"), name)(QUICK, report)


@pytest.mark.process
@pytest.mark.parametrize("name", ["stall", "graph", "profiles"])
def test_other_pieces(name: str, tmp_path: Path) -> None:
    """With the two above, pieces of each module; what the others measure differs by what it is given."""
    start = nursery.Start(rehearse, (name, tmp_path), os.environ | nursery.THREADS, tmp_path / "out")
    (process,) = nursery.start([start])
    assert process.wait() == 0, (tmp_path / "out").read_text()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"] or found["text"]


def test_every_piece_exists() -> None:
    for name, (module, limit) in gpu.PIECES.items():
        assert hasattr(
            __import__(f"benchmarks.{module}", fromlist=["x"]), name.partition(":")[0].replace("compile", "compiled")
        )
        assert limit > gpu.LEAST_SECONDS


@pytest.mark.process
def test_a_piece_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "python"))
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *modes*) sleep 60 & echo hanging; wait;; esac\nexit 3\n')
    script.chmod(0o755)
    began = time.monotonic()
    chosen = options(tmp_path)
    failed = gpu._run("same_bits", 20, chosen, tmp_path)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    hung = gpu._run("modes", 0.5, chosen, tmp_path)
    assert time.monotonic() - began < 30
    assert (failed.status, hung.status, hung.error) == ("failed", "out of time", "hanging")
    assert "--piece same_bits" in failed.error
    assert gpu._run("modes", 0.05, chosen, tmp_path).status == "left out"
    gpu._write({"same_bits": failed, "modes": hung}, chosen)
    assert "modes: out of time" in (tmp_path / "gpu.md").read_text()


def test_what_a_killed_piece_had_found_is_kept(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    report.add(gpu_bench.wrong("bits", 1), text="so far")
    found = json.loads(report.path.read_text())
    assert (found["rows"][0]["met"], found["text"]) == (False, "so far\n\n")


def test_a_trace_is_read(tmp_path: Path) -> None:
    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("kernel", "b", 20, 10),
        event("kernel", "a", 0, 10),
        event("kernel", "a", 5, 10),  # beside the first one, on another stream
        event("gpu_memcpy", "copy", 34, 2),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 1),
        event("cpu_op", "aten::add", 0, 100),
        {"ph": "M", "name": "process_name"},
    ]
    trace = gpu_parts.read_trace(events, ("kernel", "gpu_memcpy"))
    assert (trace.busy_ms, trace.count, trace.launches) == (0.027, 4, 1)
    assert trace.median_gap_us == 4  # of 0 (overlap), 5 and 4, and the 0 that stands for no gap at all
    assert trace.kernels == [("a", 2, 20), ("b", 1, 10), ("copy", 1, 2)]
    assert gpu_parts.read_trace([], ("kernel",)).table().count("\n") == 1


def test_turns_leave_the_peers_switches_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gpu_bench.timed_engine(QUICK, "ours", QUICK.engine(16))
    own.step = lambda: None
    torch.use_deterministic_algorithms(False)
    turns = gpu_speed.Turns(QUICK, own, batch=16, drain=3)
    steps = 0
    with pytest.raises(gpu_speed.EnoughError):
        while steps < 10_000:
            steps += 1
            time.sleep(0.001)
            turns()
            assert not torch.are_deterministic_algorithms_enabled()
    assert len(turns.ours) == len(turns.theirs) == QUICK.repetitions
    assert 3 * QUICK.repetitions < steps
    assert all(rate <= 16 / 0.001 for rate in turns.theirs), "steps that were not timed were counted"


def test_steps_are_those_of_the_training_loop() -> None:
    taken: list[tuple[int, int, int, int]] = []
    engine = QUICK.engine(96)
    engine.step = lambda epoch, step, done, rows: taken.append((epoch, step, done, len(rows)))  # type: ignore[method-assign]
    step = Steps(engine)
    for _ in range(4):
        step()
    assert taken == [(0, 0, 0, 96), (0, 1, 1, 96), (1, 0, 2, 96), (1, 1, 3, 96)]  # of 256 images


def test_steps_that_may_be_captured_differ_by_row_and_key() -> None:
    """What a graph would replay depends on nothing that it would freeze."""

    def weights(first_key: int) -> list[torch.Tensor]:
        step = gpu_speed.GraphedSteps(QUICK.engine(16, lookahead={"enabled": False}))
        step.done = first_key
        for _ in range(2):
            step()
        return gpu_bench.state_tensors(step.engine)

    one, again, other = weights(0), weights(0), weights(16)  # 16 batches on, the rows are the same again
    assert gpu_bench.differing(one, again) == 0
    assert gpu_bench.differing(one, other) > 0
