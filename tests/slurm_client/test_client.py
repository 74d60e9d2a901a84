"""Reading what Slurm's commands print."""

from __future__ import annotations

import os
import re
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cifar_hpc.__main__ import main
from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch.preflight import why_busy
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points
from cifar_hpc.runs.queue import queue
from cifar_hpc.slurm import client as slurm

SHOWN = (
    "JobId=5 JobName=my run UserId=me(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "EndTime=2026-01-01T10:00:00 PreemptTime=None Comment=a=b c Command=/x y/z.sh \n"
)


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_job_fields(fake: Path) -> None:
    (fake / "shown").write_text(SHOWN)
    program(fake, "scontrol", f"cat '{fake}/shown'")
    fields = slurm.job_fields("5")
    assert fields["JobState"] == "RUNNING" and fields["Restarts"] == "2" and fields["JobName"] == "my run"
    assert fields["EndTime"] == "2026-01-01T10:00:00" and fields["Command"] == "/x y/z.sh"


def test_job_fields_ignores_fields_in_a_comment(fake: Path) -> None:
    (fake / "shown").write_text("JobId=5 JobState=RUNNING Restarts=2 Comment=x JobState=FAILED Restarts=9 WorkDir=/a b")
    program(fake, "scontrol", f"cat '{fake}/shown'")
    fields = slurm.job_fields("5")
    assert (fields["JobState"], fields["Restarts"], fields["WorkDir"]) == ("RUNNING", "2", "/a b")


ARRAY = "JobId=9 ArrayJobId=5 ArrayTaskId=1 JobName=x JobState=RUNNING"
NOT_ANSWERED = {
    "nothing": ("", "it printed nothing"),
    "blank": ("\n \n", "it printed nothing"),
    "words": ("Welcome to the cluster", "it printed Welcome to the cluster"),
    "another job": (SHOWN.replace("JobId=5", "JobId=6"), "it printed JobId=6"),
    "two jobs": (SHOWN + SHOWN, "it printed JobId=5"),
    "a line cut short": ("JobId=5 JobName=my", "it printed JobId=5"),
    "another task": (ARRAY, "it printed JobId=9"),
}


@pytest.mark.parametrize(("shown", "words"), NOT_ANSWERED.values(), ids=NOT_ANSWERED)
def test_job_fields_of_anything_but_this_job_is_no_answer(fake: Path, shown: str, words: str) -> None:
    (fake / "shown").write_text(shown)
    program(fake, "scontrol", f"cat '{fake}/shown'")
    with pytest.raises(SchedulerError, match=f"scontrol show job 5 does not answer: {words}"):
        slurm.job_fields("5")


def test_job_fields_behind_a_banner_and_of_a_task(fake: Path) -> None:
    (fake / "shown").write_text(f"Welcome!\n{SHOWN}bye JobId=7\n")
    program(fake, "scontrol", f"cat '{fake}/shown'")
    assert slurm.job_fields("5")["JobState"] == "RUNNING"
    (fake / "shown").write_text(ARRAY)
    assert slurm.job_fields("5_1")["JobId"] == slurm.job_fields("9")["JobId"] == "9"


@pytest.mark.parametrize("line", ["8|b|RUNNING", "8|b|RUNNING|None|N/A|n1|gpu|(null)", "8|b|running|a|b|c|d|e|/f"])
def test_a_line_of_a_job_that_makes_no_sense_is_no_answer(fake: Path, line: str) -> None:
    program(fake, "squeue", f"echo '{line}'")
    with pytest.raises(SchedulerError, match=r"squeue does not answer: it printed '8\|b\|"):
        queue(fake)


def test_queue_behind_a_banner_and_beside_names_with_bars(fake: Path) -> None:
    ours = f"8|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/code/2e"
    lines = ["Welcome | to | the | cluster", "5 users", "7|a|b c|PENDING|None|N/A||gpu|(null)|/x|y", ours]
    program(fake, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    assert {name: job.nodes for name, job in queue(fake).items()} == {"b": "n1"}
    other, _ = slurm.squeue()
    assert (other.name, other.state, other.directory) == ("a|b c", "PENDING", "/x|y")


@pytest.mark.parametrize("name", ["my\njob", "a\n\n|b\n", "uni\x85x", "\u2028", "two\n5 users"])
def test_a_name_with_line_breaks_hides_no_job(fake: Path, name: str) -> None:
    """That of a job of another project; the lines of a site's own stand around."""
    ours = f"8|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/code/2e"
    (fake / "lines").write_text(f"hello\n3|{name}|PENDING|None|N/A||gpu|(null)|/x\n{ours}\nbye\n")
    program(fake, "squeue", f"cat '{fake}/lines'")
    assert {name: job.directory for name, job in queue(fake).items()} == {"b": f"{fake}/logs/b/code/2e"}
    other, _ = slurm.squeue()
    assert (other.job_id, other.state, other.directory) == ("3", "PENDING", "/x")


def test_jobs_by_id_in_batches(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "IDS_A_CALL", 2)
    line = f"5_1|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/code/2e|alice"
    program(
        fake,
        "squeue",
        f"""echo "$@" >> '{fake}/asked'; case "$*" in *=5_1,6*) echo '{line}'; echo '{line}' | sed s/5_1/55_1/;;
        *) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac""",
    )
    (job,) = slurm.squeue_jobs(["5_1", "6", "7"]).values()
    assert (job.job_id, job.user, job.nodes) == ("5_1", "alice", "n1") and len(asked(fake)) == 2
    program(fake, "squeue", "echo 'Unable to contact' >&2; exit 1")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        slurm.squeue_jobs(["5"])


def test_queue_asks_by_user_id(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    program(fake, "squeue", f"echo \"$@\" > '{fake}/asked'")
    assert queue(fake) == {}
    assert f"--user {os.getuid()} " in (fake / "asked").read_text()


def test_queue(fake: Path) -> None:
    lines = [
        f"7|a-1|PENDING|Priority|N/A||gpu|(null)|{fake}/logs/a-1/code/1f",
        f"8|b|RUNNING|None|2026-01-01T00:00:00|n[1-2]|gpu|(null)|{fake}/logs/b/code/2e",
        "9|c|RUNNING|None|N/A|n1|gpu|(null)|/another/clone/logs/c/code/2e",
    ]
    program(fake, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    jobs = queue(fake)
    assert list(jobs) == ["a-1", "b"]
    first = jobs["a-1"]
    assert (first.job_id, first.name, first.state, first.reason, first.nodes) == ("7", "a-1", "PENDING", "Priority", "")
    assert (jobs["b"].nodes, jobs["b"].partition, jobs["b"].dependency) == ("n[1-2]", "gpu", "(null)")


def test_a_job_is_known_by_its_folder_whatever_its_name(fake: Path) -> None:
    """After `scontrol update jobid=7 JobName=x`; a job that was submitted from within a run's folder is none of it."""
    (fake / "logs" / "b" / "slurm").mkdir(parents=True)
    program(fake, "squeue", f"echo '7|x|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/code/2e'")
    assert queue(fake)["b"].job_id == "7"
    program(fake, "squeue", f"echo '7|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/slurm/mine'")
    assert queue(fake) == {}


def test_a_folder_is_known_under_another_path(fake: Path) -> None:
    """By device and inode, as one behind a link or a bind mount; by the recorded job where that path is not here."""
    (fake / "root" / "logs" / "b").mkdir(parents=True)
    (fake / "other").symlink_to("root")
    for place, job_id, found in (
        (fake / "other", "8", True),
        (Path("/auto/x"), "8", True),
        (Path("/auto/x"), "9", False),
    ):
        program(fake, "squeue", f"echo '{job_id}|b|RUNNING|None|N/A|n1|gpu|(null)|{place}/logs/b/code/2e'")
        if place != fake / "other":
            (fake / "root" / "logs" / "b" / "events.jsonl").write_text('{"event": "submitted", "job_id": "8"}\n')
        assert list(queue(fake / "root")) == ["b"] * found
    (fake / "copy" / "logs" / "b").mkdir(parents=True)  # with its logs, while the job of the original is queued
    shutil.copy(fake / "root" / "logs" / "b" / "events.jsonl", fake / "copy" / "logs" / "b")
    program(fake, "squeue", f"echo '8|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/root/logs/b/code/2e'")
    assert queue(fake / "copy") == {} and list(queue(fake / "root")) == ["b"]


@pytest.mark.parametrize("place", ["{old}/logs/b/code/2e", "/tmp"])
def test_a_job_in_another_folder_is_the_runs_own_if_the_run_has_recorded_it(fake: Path, place: str) -> None:
    """The root was renamed while the job ran, which has made the old one again; or `scontrol update WorkDir=/tmp`."""
    old, new = RunPaths(fake / "old", "b"), RunPaths(fake / "new", "b")
    for run in (old, new):
        run.create()
    submitted = '{"event": "submitted", "job_id": "8"}\n'
    new.events.write_text(submitted)
    old.events.write_text('{"event": "checkpoint", "job_id": "8"}\n')
    line = f"8|b|RUNNING|None|N/A|n1|gpu|(null)|{place.format(old=old.root)}"
    program(fake, "squeue", f"echo '{line}'")
    jobs = queue(new.root)
    assert jobs["b"].job_id == "8"
    reason = f"run b is already in the queue as job 8 (RUNNING), which works in {place.format(old=old.root)}. HINT: "
    assert (why_busy(new, jobs) or "").startswith(reason)
    program(fake, "squeue", f"echo '{line.replace('8|', '9|')}'")
    assert queue(new.root) == {}  # a job of that name, which another project may have
    program(fake, "squeue", f"echo '{line}'")
    if "old" in place:  # the original of a copied project has recorded the submission, too
        old.events.write_text(submitted)
        assert queue(new.root) == {} and list(queue(old.root)) == ["b"]


def test_a_sweep_whose_root_was_renamed_is_known_by_the_recorded_jobs(fake: Path) -> None:
    for root in ("old", "new"):
        sweep = SweepPaths(fake / root, "s", 1)
        sweep.create()
        write_points(sweep, ["s-0", "s-1"])
        RunPaths(fake / root, "s-1").create()
    submitted, old = '{"event": "submitted", "job_id": "8_1"}\n', RunPaths(fake / "old", "s-1")
    RunPaths(fake / "new", "s-1").events.write_text(submitted)
    line = f"8_1|s:sweep|RUNNING|None|N/A|n1|gpu|(null)|{fake}/old/logs/sweeps/s/1/code/2e"
    program(fake, "squeue", f"echo '{line}'; echo '{line}' | sed s/8_1/8_0/")
    assert {name: job.job_id for name, job in queue(fake / "new").items()} == {"s-1": "8_1"}
    old.events.write_text(submitted)
    assert queue(fake / "new") == {} and sorted(queue(old.root)) == ["s-0", "s-1"]


def test_a_sweeps_folder_is_known_under_another_path(fake: Path) -> None:
    for root, names in (("root", ["s-0", "s-1"]), ("clone", ["s-2", "s-3"])):
        sweep = SweepPaths(fake / root, "s", 1)
        sweep.create()
        write_points(sweep, names)
    (fake / "other").symlink_to("root")
    run = RunPaths(fake / "root", "s-1")
    for place, found in ((fake / "other", ["s-1"]), (fake / "clone", []), (Path("/auto/x"), [])):
        program(fake, "squeue", f"echo '8_1|s:sweep|RUNNING|None|N/A|n1|gpu|(null)|{place}/logs/sweeps/s/1/code/2e'")
        assert list(queue(fake / "root")) == found
    run.create()
    run.events.write_text('{"event": "submitted", "job_id": "8_1"}\n')
    assert list(queue(fake / "root")) == ["s-1"]


def test_a_singleton_that_waits_for_another_folders_job_says_so(fake: Path) -> None:
    for root in ("mine", "theirs"):
        (fake / root / "logs" / "b").mkdir(parents=True)
    lines = [f"7|b|PENDING|JobHeldUser|N/A||gpu|(null)|{fake}/theirs/logs/b/code/1f"]
    lines += [f"8|b|PENDING|Dependency|N/A||gpu|singleton(unfulfilled)|{fake}/mine/logs/b/code/1f"]
    program(fake, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    (job,) = queue(fake / "mine").values()
    assert job.why == f"Dependency: job 7, of the same name in {fake}/theirs/logs/b, must end first"
    lines[0] = lines[0].replace("theirs", "mine")
    program(fake, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    assert queue(fake / "mine")["b"].why == "Dependency: another job of this run must end first"


def test_queue_does_not_wait_for_a_slow_squeue(fake: Path) -> None:
    program(fake, "squeue", "exec sleep 60")
    with pytest.raises(SchedulerError, match=r"did not answer within 0\.2 s"):
        queue(fake, timeout_seconds=0.2)


def test_command_ignores_the_users_own_settings_of_slurms_commands(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["SQUEUE_STATES", "SLURM_CLUSTERS", "SINFO_PARTITION", "SCONTROL_LOCAL", "SCANCEL_NAME"]
    for name in (*settings, "SLURM_TIME_FORMAT", "SQUEUE_ALL", "SLURM_CONF", "SQUEUER"):
        monkeypatch.setenv(name, "x")
    program(fake, "squeue", "env")
    seen = dict(line.split("=", 1) for line in slurm.command(["squeue"]).splitlines() if "=" in line)
    assert seen.keys().isdisjoint(settings) and seen["SLURM_TIME_FORMAT"] == "%s"
    assert {seen[name] for name in ("SQUEUE_ALL", "SCONTROL_ALL")} == {"1"}  # jobs in hidden partitions, too
    assert {seen[name] for name in ("SLURM_CONF", "SQUEUER")} == {"x"}
    program(fake, "sbatch", "env")
    monkeypatch.setenv("SBATCH_WAIT", "1")
    handed_on = dict(line.split("=", 1) for line in slurm.command(["sbatch"]).splitlines() if "=" in line)
    assert handed_on.keys().isdisjoint([*settings, "SBATCH_WAIT"]) and handed_on["SLURM_CONF"] == "x"


def test_queue_reads_folders_of_any_name(fake: Path) -> None:
    ours = f"8|b|RUNNING|None|N/A|n1|gpu|(null)|{fake}/logs/b/code/2e"
    program(fake, "squeue", f"printf '7|x|RUNNING|None|N/A|n1|gpu|(null)|/d\\351j\\340\\n'; echo '{ours}'")
    assert list(queue(fake)) == ["b"]


@pytest.mark.parametrize(
    ("state", "reason", "calls"),
    [
        ("RESV_DEL_HOLD", "ReservationDeleted", ["update", "release 7"]),
        ("SPECIAL_EXIT", "None", ["update", "release 7"]),
        ("REQUEUE_HOLD", "job_requeued_in_held_state", ["update", "release 7"]),
        ("REQUEUE_FED", "None", ["update"]),
        ("PENDING", "BeginTime", ["update"]),
    ],
)
def test_requeue_run_releases_what_is_held(
    fake: Path, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, calls: list[str]
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(fake))
    (fake / "logs" / "run").mkdir(parents=True)
    program(fake, "squeue", f"echo '7|run|{state}|{reason}|N/A||gpu|(null)|{fake}/logs/run/code/1f'")
    for name in ("scontrol", "scancel"):
        program(fake, name, f"echo \"$@\" >> '{fake}/asked'")
    assert main(["requeue", "run"]) == 0
    assert [line.partition(" jobid")[0] for line in asked(fake)] == calls


@pytest.mark.parametrize(("then", "fails"), [("RUNNING", False), ("PENDING", True)])
def test_requeue_run_of_a_job_that_starts_meanwhile(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], then: str, fails: bool
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(fake))
    (fake / "logs" / "run").mkdir(parents=True)
    line = f"7|run|$state|Resources|N/A||gpu|(null)|{fake}/logs/run/code/1f"
    program(fake, "squeue", f'state=PENDING; [ ! -e {fake}/asked ] || state={then}; echo "{line}"')
    program(fake, "scontrol", f"touch {fake}/asked; echo 'Job is no longer pending execution for job 7' >&2; exit 1")
    assert main(["requeue", "run"]) == (3 if fails else 0)
    assert ("no longer pending" in capsys.readouterr().err) is fails


def test_queue_is_empty_without_a_cluster(fake: Path) -> None:
    program(fake, "squeue", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    assert queue(fake) == {}
    program(fake, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        queue(fake)


def test_a_refusal_has_slurms_words(fake: Path) -> None:
    program(
        fake,
        "scontrol",
        "echo 'Access/permission denied' >&2; [ $1 = show ] && echo JobId=9 JobState=RUNNING Restarts=0",
    )
    with pytest.raises(SchedulerError, match=r"scontrol requeue 9 was refused: Access/permission denied"):
        slurm.requeue_job("9")


def asked(fake: Path) -> list[str]:
    """What the fake scontrol was asked."""
    return (fake / "asked").read_text().splitlines()


@pytest.mark.parametrize(
    ("delay", "fewest", "expected"),
    [
        (0, None, ["requeue 9"]),
        (121, None, ["requeue 9"]),  # Slurm's own
        (240, None, ["requeue 9", "update jobid=9 StartTime=now+240"]),
        (0, 2, ["requeue 9", "update jobid=9 NumTasks=2"]),
    ],
)
def test_requeue_job(fake: Path, delay: int, fewest: int | None, expected: list[str]) -> None:
    program(fake, "scontrol", f"echo \"$@\" >> '{fake}/asked'")
    slurm.requeue_job("9", delay, fewest)
    assert asked(fake) == expected


def test_the_whole_array_keeps_away_from_a_node(fake: Path) -> None:
    program(fake, "scontrol", f"echo \"$@\" >> '{fake}/asked'; [ $1 = requeue ]")  # refused for tasks that run
    slurm.requeue_job("9_1", exclude="n1,n2")
    assert asked(fake) == ["requeue 9_1", "update jobid=9 ExcNodeList=n1,n2"]


def test_requeue_job_succeeds_where_only_the_updates_after_it_are_refused(fake: Path) -> None:
    program(fake, "scontrol", f'echo "$@" >> \'{fake}/asked\'; [ "$1" = requeue ]')
    slurm.requeue_job("9", 240, 2)
    assert len(asked(fake)) == 3


def test_a_requeue_that_is_said_to_have_failed_may_have_worked(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "slurm_requeue error: Socket timed out on send/recv operation"
    body = f"if [ $1 = show ]; then echo JobId=9 JobState=COMPLETING Restarts=2; else echo '{words}' >&2; exit 1; fi"
    program(fake, "scontrol", body)
    slurm.requeue_job("9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # so this start was not requeued
    with pytest.raises(SchedulerError, match="Socket timed out"):
        slurm.requeue_job("9")


def test_release_job_is_not_within_the_second_of_the_requeue(fake: Path) -> None:
    program(fake, "scontrol", f"echo \"$@\" >> '{fake}/asked'")
    slurm.release_job("9")
    (line,) = asked(fake)
    match = re.fullmatch(r"update jobid=9 StartTime=now\+(\d+)", line)
    assert match and 2 <= int(match[1]) <= 5


def test_commands_outlive_the_signal_that_their_own_request_brings(fake: Path) -> None:
    program(fake, "scontrol", f"kill -TERM $$; kill -USR1 $$; kill -USR2 $$; echo \"$@\" >> '{fake}/asked'")
    slurm.requeue_job("9")
    assert asked(fake) == ["requeue 9"]


def test_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match="scontrol is not on PATH"):
        slurm.job_fields("1")


def test_answers(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake))
    assert not slurm.answers()
    program(fake, "sbatch", "exit 0")
    program(fake, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.answers()
    program(fake, "squeue", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    assert not slurm.answers()
    program(fake, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"does not answer.*Unable to contact"):
        slurm.answers()


@pytest.mark.parametrize("text", ["None", "N/A", "Unknown", "", None])
def test_parse_instant_of_no_time(text: str | None) -> None:
    assert slurm.parse_instant(text) is None


def test_parse_instant() -> None:
    assert slurm.parse_instant("1767323045") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_forbid_requeue(fake: Path) -> None:
    program(fake, "scontrol", f"echo \"$@\" >> '{fake}/asked'; exit 1")  # a refusal ends nothing
    slurm.forbid_requeue("7_1")
    assert (fake / "asked").read_text() == "update jobid=7_1 Requeue=0\n"
