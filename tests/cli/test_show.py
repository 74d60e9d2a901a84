"""The show command: a run in any state, of an older version, with damaged files, on 80 columns."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT

from benchmarks.many_runs import KINDS, make_runs
from cifar_hpc.__main__ import main
from cifar_hpc.cli.show import _restarts, describe, screen
from cifar_hpc.cli.status import Reader
from cifar_hpc.runs.paths import RunPaths, all_runs

RECORDED = PROJECT / "tests" / "recorded"
REASON = "RunFailedError: " + "the loss is NaN, " * 10 + "at the end. HINT: a smaller optimizer.lr."


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of each kind, one of an older version, and a squeue."""
    commands = make_runs(tmp_path, len(KINDS))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    old = RunPaths(tmp_path, "old")
    old.create()
    for name in ("spec.yaml", "events.jsonl", "metrics.jsonl", "train.log"):
        shutil.copy(RECORDED / name, old.logs)
    shutil.copy(RECORDED / "step_00000011.pt", old.checkpoints)
    return tmp_path


def shown(root: Path, name: str, width: int | None = 80) -> list[str]:
    (state,) = Reader(root, [name]).read()
    return screen(state, describe(RunPaths(root, name), state), width)


def report(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["show", name, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_run_fits_a_screen_and_says_its_state(root: Path) -> None:
    for paths in all_runs(root):
        (state,) = Reader(root, [paths.name]).read()
        lines = shown(root, paths.name)
        folders = [line for line in lines if str(root) in line]
        assert len(folders) == 2 and len(lines) <= 45
        assert max(len(line) for line in lines if line not in folders and "-m cifar_hpc" not in line) <= 80
        assert lines[0].split() == ["run", paths.name] and lines[1].split(maxsplit=1)[1].startswith(state.state)


def test_an_old_run_is_shown_in_full(root: Path) -> None:
    text = "\n".join(shown(root, "old", None))
    for words in (
        "1.2/4; newest checkpoint: step 11 (epoch 1.22), ",
        "15.00% after epoch 1, best 15.00%",
        "restarts     0",
        "train.epochs=4",
        "less than 0.01 device-hours",
        "1 × AMD EPYC (x86_64 AVX512), 1 CPU thread each",
        "torch 2.14.1+cu130",
        "STOPPED by SIGTERM: step 11 is on disk",
    ):
        assert words in text
    assert "gone" not in text and "time 04:00:00, nodes 1, gpus_per_node 0" in text


def test_a_checkpoint_that_is_gone_is_said(root: Path) -> None:
    (root / "checkpoints" / "old" / "step_00000011.pt").unlink()
    assert "but its file is gone" in " ".join(" ".join(shown(root, "old")).split())


def test_a_failure_has_its_whole_reason_and_the_end_of_the_log(root: Path) -> None:
    events = root / "logs" / "old" / "events.jsonl"
    with events.open("a") as file:
        print(json.dumps({"event": "failed", "step": 11, "error": REASON, "cause": "error", "again": False}), file=file)
    lines = shown(root, "old")
    assert REASON.removeprefix("RunFailedError: ") in " ".join(" ".join(lines).split())
    assert "the last lines of train.log:" in lines and "not requeued; submit the same again" in lines[-1]
    assert max(len(line) for line in lines if str(root) not in line) <= 80


def test_restarts_stand_with_their_causes_and_times(root: Path) -> None:
    running = next(p.name for p in all_runs(root) if Reader(root, [p.name]).read()[0].state == "running")
    lines = shown(root, running)
    first = next(number for number, line in enumerate(lines) if line.startswith("restarts"))
    assert lines[first + 1].strip() == "... 7 earlier ones"
    assert lines[first + 6].split(maxsplit=2)[2] == "timeout, from step 71953 on 4 ranks"
    start = {"time": None, "cause": "timeout", "step": 5, "world_size": 1}
    assert _restarts([start, start]) == ["at an unknown time  timeout, from step 5 on 1 rank"]
    assert f"python -m cifar_hpc cancel {running}" in lines[-1]
    with pytest.MonkeyPatch.context() as patch:  # pasted in any other folder, it works as well
        patch.chdir(root)
        assert shown(root, running)[-1].split(maxsplit=1)[1].startswith(f"cd {PROJECT} && ")


def test_memory_by_rank(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("old", capsys)["peak_memory_bytes"] == {}
    progress = root / "logs" / "old" / "progress.json"
    row = json.loads(progress.read_text())
    progress.write_text(json.dumps({**row, "peak_memory_bytes": {"0": 3 << 30, "1": 1 << 29}}))
    assert any("3.00, 0.50 GiB (ranks 0 to 1)" in line for line in shown(root, "old"))
    progress.write_text(json.dumps({**row, "peak_memory_bytes": {str(rank): (rank + 1) << 30 for rank in range(9)}}))
    assert any("1.00 to 9.00 GiB on 9 ranks" in line for line in shown(root, "old"))


def test_json_has_the_keys_of_status_and_the_documented_ones(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report("old", capsys)
    assert main(["status", "old", "--json"]) == 0
    (of_status,) = json.loads(capsys.readouterr().out)
    assert list(found)[: len(of_status)] == list(of_status)
    page = (PROJECT / "docs" / "formats.md").read_text().partition("## show --json")[2].partition("\n## ")[0]
    assert all(f"`{key}`" in page for key in list(found)[len(of_status) :])
    assert found["checkpoint"]["step"] == 11 and found["starts"][0]["cause"] is None and len(found["last_epochs"]) == 1
    assert found["differences"]["train.epochs"] == 4 and found["device"] == "cpu" and found["device_seconds"] > 0


@pytest.mark.parametrize("name", ["spec.yaml", "events.jsonl", "metrics.jsonl", "train.log", "progress.json"])
@pytest.mark.parametrize(
    "content", [b"\0\xff{", b"[1]\n", b'{"epoch": "x", "event": 3}\n', b'{"event": "checkpoint", "step": []}\n', None]
)
def test_damaged_files_give_less_and_no_traceback(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    file = root / "logs" / "old" / name
    file.unlink(missing_ok=True)
    file.write_bytes(content) if content is not None else file.mkdir()
    assert main(["show", "old"]) == 0
    assert capsys.readouterr().out.startswith("run          old\nstate        ")
    report("old", capsys)


def test_a_silent_slurm_leaves_what_files_tell(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queued = next(p.name for p in all_runs(root) if Reader(root, [p.name]).read()[0].state == "queued")
    (root / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert main(["show", queued]) == 3
    captured = capsys.readouterr()
    assert "unknown: Slurm does not answer" in captured.out and captured.err.startswith("error: squeue")


def test_an_unknown_run_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "odl"]) == 2
    assert "no such run" in capsys.readouterr().err
