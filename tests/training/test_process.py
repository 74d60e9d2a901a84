"""Processes of an attempt: the time that a start takes, what it must not load, and the flag that stop signals set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import PROJECT, TINY, tiny_spec

from cifar_hpc.config.io import merge
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import process
from cifar_hpc.training.context import Context
from cifar_hpc.training.exit import stopped
from cifar_hpc.training.process import (
    STOP_SIGNALS,
    Launch,
    Patience,
    StopFlag,
    Stopwatch,
    is_running,
    launch_of,
    process_age,
)  # fmt: skip

PHASES = {"process", "import", "group", "lock", "checkpoint", "data", "model"}


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 14.0, 14.25])
    monkeypatch.setattr(process, "process_age", lambda: 0.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch = Stopwatch()
    for phase in ("import", "data", "import"):
        watch.lap(phase)
    monkeypatch.undo()
    assert watch.plain() == {"process": 0.5, "import": 1.25, "data": 3.0, "total": 4.75}
    assert str(watch) == "4.8 s: process 0.5, import 1.2, data 3.0"
    assert not watch.over
    watch.lap(process.FIRST_STEP)
    assert watch.over


def test_patience_ends_in_time_and_hardly_counts_a_suspension(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def asks(patience: Patience, after: list[float]) -> int:
        """How often it says that there is time."""
        for count, seconds in enumerate(after):
            now[0] += seconds
            if patience.over():
                return count
        return len(after)

    assert asks(Patience(300), [1.0] * 400) == 300
    assert asks(Patience(300), [86_400.0, *[1.0] * 400]) == 1 + 290
    assert asks(Patience(3), [86_400.0, *[1.0] * 9]) == 1 + 2, "also where the limit is short"
    assert asks(Patience(1800), [10.0] * 400) == 180, "a look may take 10 s"


@pytest.mark.process
def test_process_age_whatever_the_name_of_the_process() -> None:
    code = (
        "import time; began = time.monotonic()\n"
        "from pathlib import Path; from cifar_hpc.training.process import process_age\n"
        "Path('/proc/self/comm').write_text('a) b (c 1')\n"
        "least = time.monotonic() - began; age = process_age(); print(least, age)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    least, age = (float(word) for word in done.stdout.split())
    assert least - 0.02 <= age <= time.monotonic() - began + 0.02  # it is known to a hundredth of a second


def test_process_age_is_0_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "")
    assert process_age() == 0.0


@pytest.mark.process
def test_siblings_are_the_other_children_of_the_parent() -> None:
    code = "from cifar_hpc.training.process import siblings; print(*siblings())"
    with subprocess.Popen(["sleep", "600"]) as other:
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
        other.kill()
    assert str(other.pid) in done.stdout.split()
    assert str(os.getpid()) not in done.stdout.split()


def test_is_running() -> None:
    child = subprocess.Popen(["true"])
    assert is_running(os.getpid())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie until it is waited for
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)


@pytest.mark.process
def test_a_start_tells_its_phases_and_imports_neither_dynamo_nor_torchvision(tmp_path: Path) -> None:
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(merge(TINY, {"train": {"epochs": 1}})))
    code = (
        "import sys; from cifar_hpc.__main__ import main\n"
        f"assert main(['train', {str(job)!r}, '--name', 'run', '--set', 'train.epochs=' + sys.argv[1]]) == 0\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'torchvision'} & set(sys.modules)))\n"
    )
    for epochs in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, epochs],
            cwd=PROJECT,
            env=os.environ | {"CIFAR_HPC_ROOT": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
    paths = RunPaths(tmp_path, "run")
    events = read_jsonl(paths.events)
    announced = [e for e in events if e["event"] in ("started", "resumed")]
    first = [e for e in events if e["event"] == "first_step"]
    assert [e["event"] for e in announced] == ["started", "resumed"]
    assert [e["step"] for e in first] == [1, announced[1]["step"] + 1]
    for ready, done_step in zip(announced, first, strict=True):
        assert ready["startup"].keys() == PHASES | {"total"}
        assert done_step["startup"].keys() == PHASES | {"first_step", "total"}
        assert all(done_step["startup"][phase] == ready["startup"][phase] >= 0 for phase in PHASES)
        for row in (ready["startup"], done_step["startup"]):
            assert row["total"] == pytest.approx(sum(v for k, v in row.items() if k != "total"), abs=0.01)
    lines = paths.train_log.read_text().splitlines()
    assert (
        sum(" ready after " in line for line in lines) == sum(" first step done after " in line for line in lines) == 2
    )


@pytest.mark.parametrize("told", [True, False])
def test_a_stop_tells_how_long_ago_the_signal_was(tmp_path: Path, told: bool) -> None:
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(), StopFlag())
    if told:
        context.stop.raise_flag()
    assert stopped(context, None, True) == 128 + 15
    (event,) = [e for e in read_jsonl(context.paths.events) if e["event"] == "signal"]
    assert (event["seconds"] is not None) == told
    assert not told or event["seconds"] >= 0
    who = "SIGTERM" if told else "another rank's signal"
    assert f"STOPPED by {who}: nothing was computed yet" in context.paths.train_log.read_text()


@pytest.fixture
def flag() -> Any:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_sets_the_flag(flag: StopFlag, number: signal.Signals) -> None:
    assert not flag.requested
    signal.raise_signal(number)
    assert flag.requested
    assert flag.signal is number
    signal.raise_signal(signal.SIGTERM)
    assert flag.signal is number


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_nohup_has_ignored_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)  # conftest puts it back
    flag = StopFlag().install(interactive=True)
    signal.raise_signal(number)
    assert not flag.requested
    signal.raise_signal(signal.SIGTERM)
    assert flag.requested


def test_sigcont_is_ignored(flag: StopFlag) -> None:
    signal.raise_signal(signal.SIGCONT)
    assert not flag.requested


def test_raise_flag_counts_as_sigterm_unless_a_signal_came_first(flag: StopFlag) -> None:
    other = StopFlag()
    other.raise_flag()
    assert other.requested and other.signal is signal.SIGTERM
    signal.raise_signal(signal.SIGUSR2)
    flag.raise_flag()
    assert flag.signal is signal.SIGUSR2


def test_seconds_since_the_first_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    assert flag.seconds is None
    clock = iter([100.0, 107.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    flag.raise_flag()
    flag.raise_flag()
    seconds = flag.seconds
    monkeypatch.undo()
    assert seconds == 7.5


def test_a_process_whose_name_is_no_text_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "4242").mkdir()
    stat = tmp_path / "4242" / "stat"
    stat.write_bytes(b"4242 (\xff\xfe) S 1 4242 4242\n")
    assert process._stat(f"../{stat.parent.relative_to('/')}") == ["S", "1", "4242", "4242"]


CPUS = len(os.sched_getaffinity(0))  # those of a job, where a node has more
TORCHRUN = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "launch", "threads"),
    [
        ({}, Launch(), CPUS),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, Launch(), CPUS),
        (TORCHRUN | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Launch(3, 4, 1), CPUS),
        (TORCHRUN | {"WORLD_SIZE": "90", "RANK": "89", "LOCAL_WORLD_SIZE": "90", "LOCAL_RANK": "89"},
         Launch(89, 90, 89), 1),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, Launch(3, 4, 1, None, "7", Path("/r/7.2-0.json")), 1),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_RESTART_COUNT": "5", "SLURM_CPUS_PER_TASK": "3"},
         Launch(3, 4, 1, None, "7", Path("/r/7.2-5.json")), 3),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch(job_id="7"), CPUS),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launch(job_id="7"), CPUS),
        (STEP | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "8", "RANK": "6"}, Launch(6, 8, 0, None, "7"),
         CPUS),
    ],
)  # fmt: skip
def test_rank_and_world_size_by_the_launchers_variables(
    environment: dict[str, str], launch: Launch, threads: int
) -> None:
    assert launch_of(environment, Path("/r")) == (launch, threads)


def test_threads_are_no_more_than_the_processors_of_a_job() -> None:
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        assert launch_of({}, Path("/r")) == (Launch(), 1)
    finally:
        os.sched_setaffinity(0, own)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK: '1' is not allowed; allowed: 0 to 0"),
        ({"RANK": "1"}, "RANK: '1' is not allowed"),
        ({"WORLD_SIZE": "2"}, "RANK: '' is not allowed; allowed: 0 to 1, with WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is not allowed"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not allowed"),
        ({"WORLD_SIZE": "9" * 9999}, "WORLD_SIZE: '9"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK: 'abc' is not allowed"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK: '²' is not allowed"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: '-1' is not allowed; allowed: 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2"}, "LOCAL_RANK: '2' is not allowed"),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE: '3' is not allowed"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR: '' is not allowed"),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR: '' is not allowed"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT: '' is not allowed"),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT: '99999' is not allowed"),
    ],
)
def test_leftovers_of_torchrun_are_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        launch_of(environment, Path("/r"))
    assert str(caught.value).startswith(words) and "torchrun" in str(caught.value)


PRINTING = """
import os, sys
from cifar_hpc.training.process import open_streams
open_streams(lossy=sys.argv[1] == "lossy")
try:
    print("\\xe9\\udc80", flush=True)
except OSError:
    pass
print("more")
print("words", file=sys.stderr)
with open(os.devnull) as file:
    assert file.fileno() > 2, "it has taken the place of a closed stream"
sys.exit(7 if sys.argv[1] != "lossy" else 0)
"""


@pytest.mark.process
@pytest.mark.parametrize("redirections", [">&- 2>&-", "<&- >/dev/full", ">/dev/full 2>/dev/full", "2>&-", "| true"])
def test_streams_that_take_nothing_change_no_exit_status(redirections: str) -> None:
    for kind, status in (("lossy", 0), ("raises", 7)):
        line = f'set -o pipefail; "$0" -c "$1" {kind} {redirections}'
        done = subprocess.run(["bash", "-c", line, sys.executable, PRINTING], cwd=PROJECT, capture_output=True)
        assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.process
def test_what_an_encoding_lacks_is_printed_as_an_escape() -> None:
    command, ascii_only = [sys.executable, "-c", PRINTING, "raises"], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=PROJECT, env=ascii_only, capture_output=True)
    assert (done.returncode, done.stdout) == (7, b"\\xe9\\udc80\nmore\n"), done.stderr


@pytest.mark.process
def test_a_run_that_can_print_nothing_finishes(tmp_path: Path) -> None:
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(merge(TINY, {"train": {"epochs": 1}})))
    line = '"$0" -m cifar_hpc train "$1" --name run >&- 2>/dev/full'
    environment = os.environ | {"CIFAR_HPC_ROOT": str(tmp_path)}
    done = subprocess.run(["bash", "-c", line, sys.executable, job], cwd=PROJECT, env=environment)
    assert done.returncode == 0
    assert read_jsonl(RunPaths(tmp_path, "run").events)[-1]["event"] == "finished"
