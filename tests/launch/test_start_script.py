"""The batch script under bash, with stubs of Slurm's programs: however a start ends, it is recorded and reported."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.config.io import Site
from cifar_hpc.launch.batch_script import batch_script
from cifar_hpc.runs.events import Attempted, append_event
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import PROJECT, RunPaths, SweepPaths, write_points

SCONTROL = """#!/bin/sh
case $1 in
show) echo "JobId=7 ArrayJobId=5 ArrayTaskId=1 JobState=RUNNING Restarts=${SLURM_RESTART_COUNT:-0} Requeue=1";;
*) echo "$*" >> "$ASKED";;
esac
"""


class Script:
    """The batch script of a run, or of a sweep with the runs `other` and `run`."""

    def __init__(self, folder: Path, sweep: bool = False) -> None:
        self.root, self.programs, self.asked = folder, folder / "bin", folder / "asked"
        self.run_paths = RunPaths(folder, "run")
        self.root.mkdir(exist_ok=True)
        self.run_paths.create()
        self.paths = SweepPaths(folder, "job") if sweep else self.run_paths
        self.paths.create()
        if isinstance(self.paths, SweepPaths):
            write_points(self.paths, ["other", "run"])
        self.spec = freeze(self.run_paths, tiny_spec(failures={"max": 2})) or tiny_spec(failures={"max": 2})
        self.programs.mkdir()
        self.stub("scontrol", SCONTROL)
        self.stub("squeue", "#!/bin/sh\necho RUNNING\n")
        self.srun("exit 1")
        self.code = PROJECT

    def stub(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def srun(self, body: str) -> None:
        self.stub("srun", f"#!/bin/bash\n{body}\n")

    def begin(self, *setup: str, python: str | None = None, **environment: str) -> subprocess.Popen[bytes]:
        text = batch_script(self.paths, self.spec, Site(setup=setup, python=python), points=2)
        file = self.root / "script.sh"
        file.write_text(text)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(self.code)}
        output = self.paths.slurm / ("5_1_0_log.out" if isinstance(self.paths, SweepPaths) else "7_0_log.out")
        with output.open("ab") as out:
            return subprocess.Popen(
                ["bash", file],
                cwd="/tmp",
                env={"PATH": f"{self.programs}:/usr/bin:/bin", "ASKED": str(self.asked), **job, **environment},
                stdout=out,
                stderr=out,
            )

    def end(self, *setup: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
        """Run the script; returns its exit status and the events that are new."""
        before = len(read_jsonl(self.run_paths.events))
        status = self.begin(*setup, **options).wait(timeout=120)
        return status, read_jsonl(self.run_paths.events)[before:]

    def requests(self) -> list[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []

    def log(self) -> str:
        return self.run_paths.train_log.read_text()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["event"] for row in rows]


@pytest.mark.parametrize(
    ("setup", "status", "words"),
    [
        (['echo "what srun says" >&2'], 1, "what srun says"),
        (["set -euo pipefail"], 1, "before training began (exit status 1)"),
        (["set -eu", "echo no such module; false", "echo not reached"], 1, "no such module"),
        (["echo gone; exit 3"], 3, "gone"),
        (["echo nothing to do; exit 0"], 0, "nothing to do"),
        (["set -u", "echo $NOWHERE"], 1, "NOWHERE: unbound variable"),
        (["trap - EXIT", "trap 'echo theirs' EXIT", "exit 4"], 4, "theirs"),
        (["if then"], 2, "syntax error near unexpected token `then'"),
        (["cat <<END", "without an end"], 2, "unexpected end of file"),
        (["exec sh -c 'echo replaced; exit 5'"], 5, "replaced"),
        (["cd /", "pwd"], 1, "/"),
        (["kill -KILL $BASHPID"], 137, "exit status 137"),
    ],
)
def test_a_start_that_ends_early_is_recorded_once_and_tried_again(
    script: Script, setup: list[str], status: int, words: str
) -> None:
    found, rows = script.end(*setup)
    assert (found, names(rows)) == (status, ["attempt", "failed", "requeued"])
    assert (rows[1]["cause"], rows[1]["again"], rows[2]["delay_seconds"]) == ("start", True, 120)
    assert words in script.log() and script.log().count("FAILED") == 1 and script.requests() == ["requeue 7"]


def test_the_shell_writes_the_row_that_python_would(script: Script, tmp_path: Path) -> None:
    script.run_paths.events.write_text('{"event": "a line cut short')
    _, rows = script.end(SLURM_RESTART_COUNT="1")
    append_event(
        tmp_path / "events.jsonl", Attempted(restart_count=1, nodes="n[1-2]"), job_id="7", restart=None, world_size=None
    )
    (expected,) = read_jsonl(tmp_path / "events.jsonl")
    assert [(k, v) for k, v in rows[0].items() if k != "time"] == [(k, v) for k, v in expected.items() if k != "time"]
    assert len(rows[0]["time"]) == len(expected["time"]) and rows[0]["time"][-1] == "Z"
    assert History.of(rows).attempts[0].start is not None


def test_a_task_of_an_array_is_recorded_in_its_own_run(tmp_path: Path) -> None:
    script = Script(tmp_path, sweep=True)
    script.srun('echo "srun says no"; exit 1')
    _, rows = script.end(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1")
    assert names(rows) == ["attempt", "failed", "requeued"] and {row["job_id"] for row in rows} == {"5_1"}
    assert rows[1]["error"].endswith("srun says no") and script.requests() == ["requeue 5_1"]


def test_what_a_rank_has_reported_is_left(script: Script) -> None:
    row = json.dumps({"event": "started", "job_id": "7", "restart": 0, "step": 0, "world_size": 2})
    end = json.dumps({"event": "failed", "job_id": "7", "restart": 0, "step": 9, "again": False})
    events = shlex.quote(str(script.run_paths.events))
    script.srun(f"printf '%s\\n' {shlex.quote(row)} {shlex.quote(end)} >> {events}; exit 1")
    for python in (None, "/nowhere/python"):
        status, rows = script.end("set -euo pipefail", python=python)
        assert (status, names(rows), script.requests()) == (1, ["attempt", "started", "failed"], [])
    end = json.dumps({"event": "finished", "job_id": "7", "restart": 0, "step": 9})
    script.srun(f"printf '%s\\n' {shlex.quote(row)} {shlex.quote(end)} >> {events}; exit 0")
    status, rows = script.end(python="false")  # so no Python was needed
    assert (status, names(rows), script.requests()) == (0, ["attempt", "started", "finished"], [])


@pytest.mark.parametrize(
    ("listed", "status"), [("1", 2), ("1-3,5", 4), ("(null)", 1), ("0,2,7-9", 1), ("1-4,200", 5), ("5,1,2", 3)]
)
@pytest.mark.parametrize("setup", ["true", "exit 1"])
def test_a_site_that_requeues_by_exit_status_starts_no_run_that_has_failed(
    script: Script, listed: str, status: int, setup: str
) -> None:
    """RequeueExit in slurm.conf; RequeueExitHold alone is harmless, since a held job starts nothing."""
    config = f"RequeueExit             = {listed}\nRequeueExitHold         = 1-255"
    script.stub("scontrol", SCONTROL.replace("show)", f"show) [ $2 != config ] || echo '{config}';", 1))
    assert script.end(setup)[0] == status
    script.srun("exit 0")
    assert script.end()[0] == 0


@pytest.mark.parametrize("left", ["IFS=0123456789", "export PYTHONSAFEPATH=1", "trap 'exit 9' ERR"])
def test_what_a_setup_leaves_behind_breaks_neither_the_tasks_nor_the_epilog(script: Script, left: str) -> None:
    (script.paths.slurm / "7_submitted.pkl").symlink_to("task.pkl")  # as after a requeue
    script.srun(f'{shlex.quote(sys.executable)} -c "import cifar_hpc" && echo found; exit 1')
    status, rows = script.end(left)
    assert (status, names(rows)) == (1, ["attempt", "failed", "requeued"]) and "found" in script.log()
    assert rows[1]["error"] == "before training began (exit status 1): found"


def test_a_site_srun_that_hides_the_status_of_killed_tasks_loses_no_run(script: Script) -> None:
    row = json.dumps({"event": "started", "job_id": "7", "restart": 0, "step": 0, "world_size": 2})
    events = shlex.quote(str(script.run_paths.events))
    script.srun(f"printf '%s\\n' {shlex.quote(row)} >> {events}; sh -c 'kill -KILL $$'; echo accounting; exit 0")
    _, rows = script.end()
    assert (names(rows), rows[2]["cause"]) == (["attempt", "started", "failed", "requeued"], "killed")
    assert script.requests() == ["requeue 7"]


def test_without_python_the_shell_counts_asks_and_at_last_holds(script: Script) -> None:
    for restarts in (0, 1, 2):
        status, rows = script.end(python="/nowhere/python", SLURM_RESTART_COUNT=str(restarts))
        assert status == 1
        assert names(rows) == ["attempt", "failed", "requeued"][: 2 + (restarts < 2)]
        assert rows[1]["again"] is (restarts < 2)
    assert script.requests() == [
        *("requeue 7", "update jobid=7 StartTime=now+120", "requeue 7", "update jobid=7 StartTime=now+240"),
        "requeuehold 7",
    ]
    assert script.log().count("/nowhere/python") == 3 and "held: the command requeue releases it" in script.log()
    assert History.read(script.run_paths.events).requeues_since_submission == {"failure": 2}


def test_preemptions_before_do_not_count_as_starts_without_python(script: Script) -> None:
    _, rows = script.end(python="/nowhere/python", SLURM_RESTART_COUNT="9")
    assert rows[1]["again"] is True and script.requests() == ["requeue 7", "update jobid=7 StartTime=now+120"]


def test_a_requeue_that_slurm_answers_with_sigterm_is_not_taken_for_a_refusal(script: Script) -> None:
    script.stub("scontrol", SCONTROL.replace("*) echo", "*) kill -TERM $$; echo"))
    assert names(script.end(python="/nowhere/python")[1]) == ["attempt", "failed", "requeued"]
    assert script.requests() == ["requeue 7", "update jobid=7 StartTime=now+120"]


@pytest.mark.parametrize("name", ["MARKUS", "FIND_CODE", "hpc_run=RUN"])
def test_names_that_hold_words_of_the_script(tmp_path: Path, name: str) -> None:
    script = Script(tmp_path / name, sweep=True)
    assert names(script.end(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1")[1]) == ["attempt", "failed", "requeued"]


def test_a_job_that_is_being_cancelled_is_not_brought_back(script: Script) -> None:
    script.stub("squeue", "#!/bin/sh\necho COMPLETING\n")
    assert names(script.end(python="/nowhere/python")[1]) == ["attempt"]
    script.stub("scontrol", SCONTROL.replace("RUNNING", "COMPLETING"))
    _, rows = script.end()
    assert names(rows) == ["attempt", "left"] and rows[1]["reason"] == "ended"
    assert script.requests() == []


def test_code_on_a_file_system_that_is_mounted_late(script: Script, tmp_path: Path) -> None:
    script.code = tmp_path / "late"
    script.srun("pwd; exit 1")
    process = script.begin()
    while not (words := Path(f"/proc/{process.pid}/cwd").readlink()):
        time.sleep(0.05)
    assert words == Path("/tmp") and not script.run_paths.events.exists()
    script.code.symlink_to(PROJECT)
    assert process.wait(timeout=120) == 1
    assert names(read_jsonl(script.run_paths.events)) == ["attempt", "failed", "requeued"]
    assert str(script.code) in (script.run_paths.slurm / "7_0_log.out").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_to_the_shell_leaves_the_tasks_to_end_by_themselves(
    script: Script, tmp_path: Path, number: signal.Signals
) -> None:
    here, go_on = tmp_path / "here", tmp_path / "go-on"
    script.srun(f"echo $PPID > {here}.new; mv {here}.new {here}; until [ -e {go_on} ]; do sleep 0.05; done; exit 6")
    process = script.begin("set -e")
    while not here.exists():
        time.sleep(0.02)
    for pid in (process.pid, int(here.read_text())):
        os.kill(pid, number)
    go_on.touch()
    assert process.wait(timeout=120) == 6
    assert names(read_jsonl(script.run_paths.events)) == ["attempt", "failed", "requeued"]


def test_logs_that_cannot_be_written_end_nothing(script: Script) -> None:
    for log in (script.run_paths.events, script.run_paths.train_log):
        log.mkdir()
    script.srun("exit 0")
    assert script.begin(python=shlex.quote(sys.executable)).wait(timeout=120) == 0
    os.mkfifo(script.run_paths.logs / "fifo")
    script.run_paths.events.rmdir()
    script.run_paths.events.symlink_to("fifo")  # a writer would wait for a reader
    assert script.begin().wait(timeout=120) == 0


def test_a_job_that_starts_after_somebody_else_has_finished_its_run_says_nothing(script: Script) -> None:
    for row in ({"event": "submitted", "job_id": "7"}, {"event": "started", "job_id": None, "restart": 0, "step": 0}):
        append_line(script.run_paths.events, json.dumps(row))
    append_line(script.run_paths.events, '{"event": "finished", "restart": 0, "step": 9, "test_accuracy": 50.0}')
    script.srun("exit 0")
    status, rows = script.end()
    assert (status, names(rows), script.requests()) == (0, ["attempt"], [])
    history = History.read(script.run_paths.events)
    assert history.state["event"] == "finished" and len(history.attempts) == 1
