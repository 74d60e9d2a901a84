"""A small campaign of tests/chaos, and that its checkers see what they are there for."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import story, verdict
from tests.chaos.places import PLACES
from tests.chaos.plan import EPOCHS, KINDS, RANDOM, STEPS_PER_EPOCH, plan
from tests.chaos.play import RUN
from tests.chaos.ranks import PROJECT, Rank
from tests.chaos.story import Chapter
from tests.chaos.trouble import ALL_BAD, DAMAGES, PASSING, REFUSALS, draw

LIMIT_SECONDS = 600  # only bounds a hang
LAST = EPOCHS * STEPS_PER_EPOCH


@pytest.mark.process
def test_thirty_faults(tmp_path: Path) -> None:
    # A seed under which nearly every place and every kind has its turn, kills around best.pt and the index included.
    folder, figures = tmp_path / "runs", tmp_path / "figures.json"
    arguments = ["--runs", "5", "--faults", "6", "--seed", "254", "--worlds", "1,2,3", "--fresh", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments, "--folder", str(folder), "--json", str(figures)],
        cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    totals = json.loads(figures.read_text())
    assert totals["faults"] >= 25, done.stdout
    assert totals["places_reached"] >= 24, done.stdout
    assert totals["by_outcome"]["died"] >= 5 and totals["by_outcome"]["stopped"] >= 5, done.stdout
    assert not list(folder.glob("run-*")), "folders of runs that were kept"


def test_the_plan_of_a_run_depends_on_the_seed_and_its_number_only() -> None:
    worlds = [1, 2, 3, 4]
    plans = [plan(7, number, 6, worlds, 0.5) for number in range(40)]
    assert plans == [plan(7, number, 6, worlds, 0.5) for number in range(40)]
    assert plans[3] != plan(8, 3, 6, worlds, 0.5)
    faults = [fault for what in plans for fault in what.faults]
    assert {fault.place for fault in faults} == {*PLACES, RANDOM}
    assert {fault.kind for fault in faults} == KINDS.keys()
    assert {fault.world for fault in faults} == set(worlds)
    assert {fault.target for fault in faults} == {"one", "other", "all"}
    assert any(fault.fresh for fault in faults) and any(fault.second for fault in faults)
    for what in plans:
        images = {"decode", "cache"} & {fault.place for fault in what.faults}
        assert not images or what.spec == "images"


def test_the_troubles_of_a_run_depend_on_the_seed_and_its_number_only() -> None:
    troubles = [list(draw(7, number, 2, [1, 2])) for number in range(20)]
    assert troubles == [list(draw(7, number, 2, [1, 2])) for number in range(20)]
    assert {trouble.kind for of_run in troubles for trouble in of_run} == {*PASSING, *DAMAGES, *REFUSALS}
    assert all(trouble.world > 1 for of_run in troubles for trouble in of_run if trouble.place == "ranks")
    assert not any(trouble.place == "ranks" for number in range(20) for trouble in draw(7, number, 2, [1]))


@pytest.mark.process
def test_every_place_is_there() -> None:
    """A hook whose function has been renamed would never catch anything."""
    code = "from tests.chaos.places import PLACES\nfor place in PLACES.values(): place.hang(lambda: None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------- the checkers


def event(kind: str, **details: Any) -> dict[str, Any]:
    return {"event": kind, "restart": 1, "world_size": 2, **details}


@pytest.fixture
def good(tmp_path: Path) -> Chapter:
    """A second start that resumes at step 3, saves at 6 and is stopped there: all is well."""
    out = tmp_path / "0.out"
    out.write_text("run run\n")
    process = subprocess.Popen(["true"])
    ranks = [Rank(number, process.pid, out) for number in range(2)]
    process.wait()
    for rank in ranks:
        os.close(rank.pidfd)
        rank.sent, rank.status = [signal.SIGTERM], 128 + signal.SIGTERM
    rows = [
        event("resumed", step=3, epoch=0, file="step_00000003.pt"),
        event("evaluated", step=5, epoch=1),
        event("checkpoint", step=5, epoch=1),
        event("checkpoint", step=6, epoch=1),
        event("signal", step=6, epoch=1, signal="SIGTERM"),
        event("left"),
    ]
    return Chapter(2, ranks, 1, 3, 6, rows, [], "STOPPED by SIGTERM: step 6 is on disk\n")


def test_a_good_start_is_good(good: Chapter) -> None:
    assert story.check(good) == []


def without(kind: str) -> Any:
    return lambda chapter: [row for row in chapter.rows if row["event"] != kind]


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (lambda c: [event("resumed", step=2, epoch=0, file="step_00000002.pt"), *c.rows[1:]], "resumed at step 2"),
        (lambda c: [event("started", step=0, epoch=0), *c.rows[1:]], "started anew"),
        (lambda c: [c.rows[0], *c.rows], "announced twice"),
        (lambda c: [c.rows[0], event("checkpoint", step=2, epoch=0), *c.rows[1:]], "after"),
        (lambda c: [*c.rows[:3], event("checkpoint", step=5, epoch=1), *c.rows[3:]], "saved twice"),
        (lambda c: [*c.rows[:3], *c.rows[1:]], "evaluated epochs"),
        (lambda c: [*c.rows, event("finished", step=LAST, epoch=EPOCHS)], "outcomes"),
        (lambda c: [*c.rows[:4], event("failed"), *c.rows[4:]], "outcomes"),
        (lambda c: [*c.rows[:4], event("hang"), *c.rows[4:]], "nothing called for"),
        (lambda c: [*c.rows[:4], event("mended"), *c.rows[4:]], "mended, though"),
        (lambda c: [*c.rows, c.rows[-2]], "signal twice"),
        (lambda c: [*c.rows[:3], *c.rows[4:]], "never saved that"),
        (without("left"), "without the events"),
        (without("resumed"), "never announced"),
        (lambda c: [row | {"world_size": 3} for row in c.rows], "world_size"),
        (lambda c: [row | {"restart": 0} for row in c.rows], "restart 0"),
    ],
)
def test_a_story_that_does_not_fit_is_seen(good: Chapter, tamper: Any, problem: str) -> None:
    good.rows = tamper(good)
    assert any(problem in found for found in story.check(good)), story.check(good)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"newest_after": 5}, "was said to be on disk"),
        ({"newest_after": 2}, "went from step 3 to 2"),
        ({"broken": ["{"]}, "broken lines"),
        ({"log": ""}, "does not say STOPPED"),
    ],
)
def test_files_that_do_not_fit_are_seen(good: Chapter, changes: dict[str, Any], problem: str) -> None:
    chapter = dataclasses.replace(good, **changes)
    assert any(problem in found for found in story.check(chapter)), story.check(chapter)


@pytest.mark.parametrize(
    ("status", "sent", "problem"),
    [
        (0, [signal.SIGTERM], "has not finished"),
        (1, [signal.SIGTERM], "ended with 1"),
        (128 + signal.SIGUSR1, [signal.SIGTERM], "ended with 138"),
        (-signal.SIGABRT, [signal.SIGTERM], "which nobody sent"),
        (-signal.SIGKILL, [], "which nobody sent"),
        (-signal.SIGTERM, [signal.SIGTERM], "should have handled"),
    ],
)
def test_statuses_that_do_not_fit_are_seen(
    good: Chapter, status: int, sent: list[signal.Signals], problem: str
) -> None:
    good.ranks[1].status, good.ranks[1].sent = status, sent
    assert any(problem in found for found in story.check(good)), story.check(good)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"rows": []}, "should be refused"),
        ({"rows": [event("failed", error="another reason")]}, "should be refused"),
        ({"rows": [event("failed", error=ALL_BAD), event("checkpoint", step=4, epoch=0)]}, "should be refused"),
        ({"log": f"FAILED: {ALL_BAD}"}, "which rank"),
        ({"newest_after": 4}, "went from 3 to 4"),
    ],
)
def test_a_refusal_is_checked(good: Chapter, changes: dict[str, Any], problem: str) -> None:
    rows = [event("failed", error=ALL_BAD)]
    refused = {"refusal": ALL_BAD, "trouble": "other data", "newest_after": 3, "log": f"{ALL_BAD} on rank 1"}
    for rank in good.ranks:
        rank.status = 1
    found = story.check(dataclasses.replace(good, **({"rows": rows} | refused | changes)))
    assert found == [] if not problem else any(problem in words for words in found), found
    good.ranks[1].status = 0
    assert any("ended with 0, refused" in words for words in story.check(dataclasses.replace(good, **refused)))


@pytest.mark.parametrize(
    ("row", "status", "problem"),
    [
        (event("checkpoint_failed"), 0, ""),
        (event("hang"), 0, "nothing called for"),
        (event("failed"), -signal.SIGSEGV, "ended with -11"),
        (event("failed"), (0, 1), "finished with statuses"),
    ],
)
def test_a_start_in_trouble_is_checked(good: Chapter, row: dict[str, Any], status: Any, problem: str) -> None:
    for rank in good.ranks:
        rank.sent, rank.status = [], status[rank.number] if isinstance(status, tuple) else status
    found = story.check(dataclasses.replace(good, passing=True, trouble="EIO logs", rows=[*good.rows, row], log=""))
    assert found == [] if not problem else any(problem in words for words in found), found


def test_output_that_does_not_fit_is_seen(good: Chapter) -> None:
    good.ranks[0].out.write_text("Traceback (most recent call last):\n")
    assert any("traceback" in found for found in story.check(good))


def test_other_weights_and_files_are_seen(tmp_path: Path) -> None:
    facts = {"problems": [], "final": {"fast_weights": "a", "rows": []}, "best": {"fast_weights": "b", "rows": []}}
    assert verdict.compare(facts, facts) == []
    for which in ("final", "best"):
        assert verdict.compare(facts | {which: {"fast_weights": "c", "rows": []}}, facts) == [
            f"{which}.fast_weights: c, undisturbed {facts[which]['fast_weights']}"
        ]
    assert len(verdict.compare({"problems": ["damaged"]}, facts)) == 5

    logs, folder = tmp_path / "logs" / RUN, tmp_path / "checkpoints" / RUN
    logs.mkdir(parents=True)
    folder.mkdir(parents=True)
    row = {"epoch": 1, "test_loss": 2.0}
    (logs / "metrics.jsonl").write_text(json.dumps(row | dict.fromkeys(verdict.VOLATILE, 0)) + "\n")
    entries = {}
    for name in ("step_00000005.pt", "best.pt"):
        (folder / name).write_bytes(name.encode())
        entries[name] = {"sha256": verdict.sha256(name.encode()).hexdigest(), "bytes": len(name)}
    best = entries.pop("best.pt")
    (folder / "index.json").write_text(json.dumps({"checkpoints": entries, "best": best}))
    (folder / "owner.lock").touch()
    assert verdict.check_files(tmp_path, RUN, 1, [row]) == []
    assert verdict.check_files(tmp_path, RUN, 1, [row, row]) != []
    (folder / "step_00000006.pt").write_bytes(b"")
    assert len(verdict.check_files(tmp_path, RUN, 1, [row])) == 2  # more than one, and not in the index
    (folder / "step_00000006.pt").unlink()
    (folder / ".index.json.1.tmp").touch()
    assert any("left over" in problem for problem in verdict.check_files(tmp_path, RUN, 1, [row]))
    (folder / ".index.json.1.tmp").unlink()
    (folder / "best.pt").write_bytes(b"another")
    assert any("not of that file" in problem for problem in verdict.check_files(tmp_path, RUN, 1, [row]))
