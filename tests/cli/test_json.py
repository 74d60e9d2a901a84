"""--json of every command, found from the parsers: standard output is exactly one JSON value, whatever happens."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT, TINY
from stub_slurm import StubSlurm

from cifar_hpc import __main__
from cifar_hpc.cli import submit
from cifar_hpc.cli.parser import build_parser
from cifar_hpc.slurm.options import left_out

# A value for each positional argument, by its metavar: one that is there, and one that is not.
GOOD = {"RUN": "tiny", "RUN|FILE": "tiny", "PATTERN": "tiny", "JOB.yaml": "logs/tiny/spec.yaml"}
BAD = dict.fromkeys(GOOD, "nowhere")
OF_SUBMIT = ("--name", "tiny", "--cluster", "local")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Those that have --json, by the command's name."""
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: dict[str, argparse.ArgumentParser] = {**action.choices, "submit.py": submit.build_parser()}
    return {name: one for name, one in found.items() if "--json" in one._option_string_actions}


def cases() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(command, arguments beside --json): as it is, with each switch, and with mistakes."""
    for name, parser in parsers().items():
        places = [str(a.metavar) for a in parser._actions if not a.option_strings]
        good = tuple(GOOD[place] for place in places) + (OF_SUBMIT if name == "submit.py" else ())
        switches = [a.option_strings[0] for a in parser._actions if a.option_strings and a.nargs == 0]
        alone = [switch for switch in switches if switch not in ("-h", "--json")]
        yield from ((name, (*good, *more)) for more in [(), *((switch,) for switch in alone)])
        yield name, (*good, "--no-such-option")
        if places:
            yield name, tuple(BAD[place] for place in places)


def run(name: str, *arguments: str) -> int:
    return submit.main(list(arguments)) if name == "submit.py" else __main__.main([name, *arguments])


def value(capfd: pytest.CaptureFixture[str]) -> Any:
    """The only JSON value on standard output."""
    return json.loads(capfd.readouterr().out)


def test_the_commands_are_found() -> None:
    assert {"status", "inspect", "evaluate", "compare", "doctor", "submit.py"} <= set(parsers())
    assert {("status", ("tiny", "--watch")), ("compare", ("nowhere",)), ("doctor", ("--job",))} <= set(cases())


@pytest.mark.process
@pytest.mark.parametrize(("name", "arguments"), list(cases()), ids=str)
def test_standard_output_is_one_json_value(
    tiny_run: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tiny_run)
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tiny_run))
    monkeypatch.setattr("cifar_hpc.slurm.client.shutil.which", lambda name: None)
    for variable in left_out(os.environ):
        monkeypatch.delenv(variable)
    status = run(name, *arguments, "--json")
    found = value(capfd)
    assert (status == 2) == ("exit_code" in found)
    assert status == 2 or not {"--no-such-option", "nowhere", "--watch", "--test-only"}.intersection(arguments)


@pytest.mark.parametrize("mode", [[], ["--dry-run"], ["--test-only"]])
@pytest.mark.parametrize("sweep", ["", "sweep: {seeds: 2}\n"])
def test_submissions_and_previews_are_one_object(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweep: str, mode: list[str]
) -> None:
    stub, job = StubSlurm(tmp_path), tmp_path / "job.yaml"
    job.write_text(f"data: {{source: synthetic}}\n{sweep}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    for name, text in {**stub.environment, "CIFAR_HPC_ROOT": str(tmp_path / "root")}.items():
        monkeypatch.setenv(name, text)
    assert submit.main([str(job), "--json", *mode]) == 0
    answer = value(capfd)
    described = (PROJECT / "docs" / "formats.md").read_text().partition("## submit.py --json")[2]
    assert [key for key in {**answer, **answer.get("points", [{}])[0]} if f"`{key}`" not in described] == []
    assert answer["job_id"] == (None if mode else "1")
    assert ("script" in answer) == ("--dry-run" in mode) and ("estimate" in answer) == ("--test-only" in mode)
    for point in answer.get("points", [answer]):
        assert (point["new"], point["step"], point["epochs"], point["processes"]) == (True, 0, 400, 1)
        assert point.get("state", "submitted") == ("to submit" if mode and sweep else "submitted")
    stub.refuse(True)
    assert (
        submit.main([str(job), "--json", "--name", "other", "--set", "train.seed=7" if not sweep else "train.epochs=7"])
        == 3
    )
    assert "Invalid job array specification" in value(capfd)["error"]


@pytest.mark.process
def test_the_log_of_a_run_that_is_followed_is_no_part_of_the_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.json"  # which YAML reads, too
    job.write_text(json.dumps({**TINY, "train": {**TINY["train"], "epochs": 1}}))
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # put back afterwards
    assert submit.main([str(job), *"--cluster local --follow --json --name followed".split()]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["run"] == "followed"
    assert "FINISHED" in captured.err
