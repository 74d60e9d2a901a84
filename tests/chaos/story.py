"""Whether events.jsonl, the exit statuses, the output and the folder of checkpoints tell the same story."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

from cifar_hpc.training.process import STOP_SIGNALS
from tests.chaos.plan import EPOCHS, STEPS_PER_EPOCH
from tests.chaos.ranks import Rank

ANNOUNCEMENTS = ("started", "resumed")
KNOWN = (*ANNOUNCEMENTS, "first_step", "signal", "left", "checkpoint", "evaluated", "finished", "failed", "mended")
IN_TROUBLE = (*KNOWN, "fallback", "checkpoint_failed")
STOPPED = range(128 + 1, 128 + 65)  # told to stop by a signal: 128 + its number
Event = dict[str, Any]


@dataclass
class Chapter:
    """One start of the run.

    Attributes:
        announced: how many starts have said so in events.jsonl before it.
        newest_before, newest_after: step of the newest checkpoint file; None without one.
        rows, broken: what it appended to events.jsonl; lines that are no JSON.
        log: what it appended to train.log.
        after_kill: whether something was killed or in trouble in the start before it, or this one begins with damage.
        halves: whether it was caught with half of a line written.
        trouble: what befell it besides signals; `passing` if that came and went while it ran.
        refusal: the words with which it must have been refused.
    """

    world: int
    ranks: list[Rank]
    announced: int
    newest_before: int | None
    newest_after: int | None = None
    rows: list[Event] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    log: str = ""
    after_kill: bool = False
    halves: bool = False
    trouble: str = ""
    passing: bool = False
    refusal: str = ""

    def kinds(self, *kinds: str) -> list[Event]:
        """Its events of some kinds."""
        return [row for row in self.rows if row.get("event") in kinds]

    @property
    def finished(self) -> bool:
        """Whether the run said so in this start."""
        return bool(self.kinds("finished"))

    @property
    def stopped(self) -> bool:
        """Whether a rank left because it was told to."""
        return any(rank.status in STOPPED for rank in self.ranks)

    @property
    def killed(self) -> bool:
        """Whether a rank died without having had a chance to say anything."""
        return any(rank.killed for rank in self.ranks)


def split_lines(text: str) -> tuple[list[Event], list[str]]:
    """The rows of a piece of events.jsonl, and its lines that are none."""
    rows, broken = [], []
    for line in text.splitlines():
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
            rows.append(row)
        except (ValueError, AssertionError):
            if line:
                broken.append(line)
    return rows, broken


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint file."""
    return max((int(p.stem.removeprefix("step_")) for p in folder.glob("step_*.pt")), default=None)


def check(chapter: Chapter) -> list[str]:
    """What is wrong with one start."""
    if chapter.refusal:
        return [*_check_refusal(chapter), *_check_output(chapter)]
    if chapter.passing:
        return [*_check_what_was_heard(chapter), *_check_output(chapter)]
    return [
        *_check_events(chapter),
        *_check_position(chapter),
        *_check_end(chapter),
        *_check_statuses(chapter),
        *_check_output(chapter),
    ]


def _check_refusal(chapter: Chapter) -> list[str]:
    """A start that must not go on says why, once, and leaves all as it was."""
    problems = [f"rank {r.number} ended with {r.status}, refused" for r in chapter.ranks if r.status != 1]
    if [row["event"] for row in chapter.rows] != ["failed"] or chapter.refusal not in chapter.rows[0]["error"]:
        problems.append(f"should be refused with the words {chapter.refusal!r}; {str(chapter.rows)[:900]}")
    if chapter.refusal not in chapter.log or (chapter.trouble.startswith("other") and "rank 1" not in chapter.log):
        problems.append(f"train.log does not say {chapter.refusal!r}, and which rank: {chapter.log[-900:]}")
    if chapter.newest_after != chapter.newest_before:
        problems.append(f"refused, and the newest went from {chapter.newest_before} to {chapter.newest_after}")
    return problems


def _check_what_was_heard(chapter: Chapter) -> list[str]:
    """Of a start whose logs may have been out of reach: what is there is true, and every rank knew what it did."""
    problems = [f"an event that nothing called for: {r}" for r in chapter.rows if r.get("event") not in IN_TROUBLE]
    problems += [
        f"rank {rank.number} ended with {rank.status}; sent to it: {rank.sent}"
        for rank in chapter.ranks
        if not (rank.killed or chapter.killed or rank.status in (0, 1, 2) or rank.status in STOPPED)
    ]
    # Of rank 0 alone the last checkpoint is.
    if not chapter.killed and chapter.ranks[0].status == 0 and any(rank.status for rank in chapter.ranks):
        problems.append(f"finished with statuses {[rank.status for rank in chapter.ranks]}")
    return problems


def _check_events(chapter: Chapter) -> list[str]:
    problems = []
    if chapter.broken and not chapter.halves:
        problems.append(f"broken lines in events.jsonl: {chapter.broken}")
    for row in chapter.rows:
        if row.get("event") not in KNOWN and not (row.get("event") == "fallback" and chapter.after_kill):
            problems.append(f"an event that nothing called for: {row}")
        if row.get("world_size") != chapter.world:
            problems.append(f"{row.get('event')}: world_size {row.get('world_size')}, started were {chapter.world}")
        if row.get("restart") != chapter.announced:
            problems.append(f"{row.get('event')}: restart {row.get('restart')}, starts before it {chapter.announced}")
    for kind in ("first_step", "signal", "left", "finished", "failed"):
        if len(chapter.kinds(kind)) > 1:
            problems.append(f"{kind} twice in one start: {chapter.kinds(kind)}")
    if len(chapter.kinds(*ANNOUNCEMENTS)) > 1:
        problems.append(f"announced twice: {chapter.kinds(*ANNOUNCEMENTS)}")
    outcomes = [kind for kind in ("signal", "finished", "failed") if chapter.kinds(kind)]
    if len(outcomes) > 1:
        problems.append(f"one start with the outcomes {outcomes}")
    work = chapter.kinds("checkpoint", "evaluated", "finished")
    if work and not chapter.kinds(*ANNOUNCEMENTS) and not chapter.halves:
        problems.append(f"{work[0]['event']} in a start that was never announced")
    return problems


def _check_position(chapter: Chapter) -> list[str]:
    """Steps never go back within a start, nor jump ahead of what is on disk at its beginning."""
    problems = []
    here = (0, 0)
    for row in chapter.kinds(*ANNOUNCEMENTS, "checkpoint", "evaluated", "signal", "finished"):
        if "step" not in row:
            continue
        position = (row["epoch"], row["step"])
        if row["event"] == "started":
            if chapter.newest_before is not None:
                problems.append(f"started anew, though step {chapter.newest_before} was on disk")
        elif row["event"] == "resumed":
            if row["step"] != chapter.newest_before:
                problems.append(f"resumed at step {row['step']}; on disk was {chapter.newest_before}")
            if row["file"] != "best.pt" and row["file"] != f"step_{row['step']:08d}.pt":
                problems.append(f"resumed at step {row['step']} from {row['file']}")
        elif position < here:
            problems.append(f"{row['event']} at {position} (epoch, step), after {here}")
        if not row["epoch"] * STEPS_PER_EPOCH <= row["step"] <= (row["epoch"] + 1) * STEPS_PER_EPOCH:
            problems.append(f"{row['event']}: step {row['step']} is not in epoch {row['epoch']}")
        if row["event"] != "evaluated":  # the position after it has the same step, and is one epoch on
            here = position
    epochs = [row["epoch"] for row in chapter.kinds("evaluated")]
    if epochs != sorted(set(epochs)):
        problems.append(f"evaluated epochs {epochs} in one start")
    saves = [(row["epoch"], row["step"]) for row in chapter.kinds("checkpoint")]
    if len(set(saves)) < len(saves):
        problems.append(f"saved twice in one start: {saves}")
    if chapter.newest_before is not None and (chapter.newest_after or 0) < chapter.newest_before:
        problems.append(f"the newest checkpoint went from step {chapter.newest_before} to {chapter.newest_after}")
    written = [row["step"] for row in chapter.kinds("checkpoint")]
    if written and (chapter.newest_after is None or chapter.newest_after < written[-1]):
        problems.append(f"step {written[-1]} was said to be on disk; there is {chapter.newest_after}")
    return problems


def _check_end(chapter: Chapter) -> list[str]:
    """A stop says where it stopped, and that is on disk; the end is said once, of the last step."""
    problems = []
    for row in chapter.kinds("signal"):
        if "step" in row:
            known = [(r["epoch"], r["step"]) for r in chapter.kinds("checkpoint", *ANNOUNCEMENTS)]
            nothing = (row["epoch"], row["step"]) == (0, 0)
            if (row["epoch"], row["step"]) not in known and not nothing and "is NOT on disk" not in chapter.log:
                problems.append(f"stopped at epoch {row['epoch']}, step {row['step']}, and never saved that: {known}")
        elif chapter.kinds(*ANNOUNCEMENTS):
            problems.append(f"a signal event without a step after the start was announced: {row}")
        if f"STOPPED by {row['signal']}" not in chapter.log and not chapter.killed:
            problems.append(f"train.log does not say STOPPED by {row['signal']}")
    if chapter.stopped and not chapter.killed and not (chapter.kinds("signal") and chapter.kinds("left")):
        problems.append("stopped without the events signal and left")
    for row in chapter.kinds("finished"):
        if (row["step"], row["epoch"]) != (EPOCHS * STEPS_PER_EPOCH, EPOCHS):
            problems.append(f"finished at {row['epoch']}, {row['step']}")
    if chapter.finished and chapter.rows[-1]["event"] != "finished":
        problems.append(f"events after finished: {chapter.rows[-1]}")
    if chapter.kinds("mended") and not chapter.after_kill:
        problems.append(f"mended, though nothing was killed before: {chapter.kinds('mended')}")
    if chapter.kinds("failed") and not chapter.killed:
        problems.append(f"failed, though nothing was killed: {chapter.kinds('failed')}")
    return problems


def _check_statuses(chapter: Chapter) -> list[str]:
    """0 where it finished, 128 + signal where it was told to stop; anything else only beside a rank that was killed."""
    problems = []
    for rank in chapter.ranks:
        # Told twice, the first counts; and what another rank was told is answered like SIGTERM.
        told = {128 + number for number in (*rank.sent, SIGTERM) if number in STOP_SIGNALS}
        assert rank.status is not None
        if rank.killed:
            # Before Python has taken the signals over they end it; every rank has, once a start is announced.
            if rank.status != -SIGKILL and chapter.kinds(*ANNOUNCEMENTS):
                problems.append(f"rank {rank.number} was ended by signal {-rank.status}, which it should have handled")
        elif rank.status == 0:
            if not chapter.finished and not chapter.killed:
                problems.append(f"rank {rank.number} ended with 0, and the run has not finished")
        elif rank.status < 0:
            problems.append(f"rank {rank.number} died of signal {-rank.status}, which nobody sent")
        elif rank.status not in told and not chapter.killed:
            problems.append(f"rank {rank.number} ended with {rank.status}; sent to it: {rank.sent}")
    if not chapter.killed:
        if chapter.finished and any(rank.status for rank in chapter.ranks):
            problems.append(f"finished with statuses {[rank.status for rank in chapter.ranks]}")
        if not chapter.finished and not any(rank.sent for rank in chapter.ranks):
            problems.append(f"nobody disturbed it: statuses {[rank.status for rank in chapter.ranks]}")
    return problems


def _check_output(chapter: Chapter) -> list[str]:
    problems = []
    for rank in chapter.ranks:
        text = rank.out.read_text(errors="replace")
        # An error of the storage that nothing foresees is shown with all its words.
        if "Traceback" in text and not chapter.killed and not (chapter.passing and "\nOSError: [Errno" in text):
            problems.append(f"rank {rank.number} printed a traceback")
        if "Fatal Python error" in text or "terminate called" in text:
            problems.append(f"rank {rank.number} crashed")
    return problems
