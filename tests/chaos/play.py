"""One run from its first start to its last: struck as planned, checked after each start, compared at the end."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import plan, ranks, story, verdict
from tests.chaos.plan import Fault, RunPlan
from tests.chaos.show import HANG_SECONDS, Show, Struck, wait
from tests.chaos.story import Chapter
from tests.chaos.trouble import RUN, Trouble
from tests.nursery import Start

Group = tuple[Trouble | None, list[Fault]]  # of one start


@dataclass
class Played:
    """A run that was played to its end, or to the first problem."""

    plan: RunPlan
    folder: Path
    struck: list[Struck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    diary: list[str] = field(default_factory=list)  # one line a start


class Stage:
    """Where runs are played, several at once: a folder for them, and one undisturbed run of each spec."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, tuple[dict[str, Any], float]] = {}
        self._referring = threading.Lock()

    def reference(self, spec: str) -> tuple[dict[str, Any], float]:
        """The facts about the undisturbed run of `spec`, and how many seconds it took."""
        with self._referring:
            return self._reference(spec)

    def _reference(self, spec: str) -> tuple[dict[str, Any], float]:
        if spec not in self._references:
            root = self.root(f"reference-{spec}", RunPlan(-1, spec, {"every_steps": 3}, (), 1))
            began = time.monotonic()
            show = Show(root, spec, 1, 0)
            problems = story.check(self._start(show, root, 0, 0))
            seconds = time.monotonic() - began
            facts: dict[str, Any] = {}
            if not problems:
                facts = self.facts(root)
                problems = facts["problems"] or verdict.check_files(root, RUN, 3, facts["final"]["rows"])
            if problems:
                raise RuntimeError(f"the undisturbed run in {root} is not well: {problems}")
            self._references[spec] = facts, seconds
        return self._references[spec]

    def play(self, what: RunPlan, troubles: Sequence[Trouble] = ()) -> Played:
        """Play a run to its end, and anew as long as faults are left. Its folders are gone if all was well."""
        played = Played(what, self.folder / f"run-{what.number}")
        groups: list[Group] = [(None, group) for group in _groups(what.faults)]
        for trouble in troubles:
            place = int(trouble.which * (len(groups) + 1))
            if trouble.shared and place < len(groups) and groups[place][0] is None:
                groups[place] = trouble, groups[place][1]
            else:
                groups.insert(place, (trouble, []))
        life = 0
        while not played.problems and (groups or life == 0):
            life += 1
            self._live(played, f"run-{what.number}-{life}", groups)
        return played

    def _live(self, played: Played, name: str, groups: list[Group]) -> None:
        """One life of a run; takes its faults from `groups`, one group a start, until it has finished."""
        what = played.plan
        facts, seconds = self.reference(what.spec)
        root = played.folder = self.root(name, what)
        best = [row["epoch"] for row in _best_rows(facts["final"]["rows"])]
        announced = number = 0
        killed = False
        while not played.problems:
            trouble, group = groups.pop(0) if groups else (None, [])
            if trouble is not None and trouble.needs_files and not story.newest_step(root / "checkpoints" / RUN):
                groups.insert(0, (trouble, group))
                trouble, group = None, [Fault("KILL", "save-renamed", "all", trouble.world, 0, 0)]
            world = max((fault.world for fault in group), default=trouble.world if trouble else what.last_world)
            show = Show(root, what.spec, world, number, trouble)
            step = story.newest_step(root / "checkpoints" / RUN) or 0
            for fault in group:
                place, count = plan.nth(fault, world, step, len(groups), what.checkpoint.get("every_steps"), best)
                show.arm(fault, place, count)
            chapter = self._start(show, root, announced, seconds)
            chapter.after_kill, killed = killed or bool(trouble), chapter.killed or bool(trouble)
            played.struck += show.struck
            played.starts += 1
            played.diary.append(f"{name} start {number}: {_diary(show, chapter)}")
            problems = ["it hangs; the stacks are in its output"] if show.hung else story.check(chapter)
            if not (group or trouble or chapter.finished or problems):
                problems = ["it was left alone, and did not finish"]
            if (root / "canary").exists():
                problems.append("code of a checkpoint was run")
            played.problems += [f"{name} start {number}: {problem}" for problem in problems]
            if chapter.finished:
                break
            announced += len(chapter.kinds(*story.ANNOUNCEMENTS))
            number += 1
        if not played.problems:
            played.problems += verdict.compare(self.facts(root), facts)
            played.problems += verdict.check_files(root, RUN, what.checkpoint["keep"], facts["final"]["rows"])
        if not played.problems:
            shutil.rmtree(root)

    def root(self, name: str, what: RunPlan) -> Path:
        """A new folder for a run, with its job file."""
        root = self.folder / name
        root.mkdir(parents=True)
        (root / "job.yaml").write_text(json.dumps(what.job()))
        if what.spec == "images":
            _make_images(root / "images")
        return root

    def facts(self, root: Path, name: str = RUN) -> dict[str, Any]:
        """The facts about the run `name` under `root`."""
        out, said = root / "facts.json", root / "verdict.out"
        (rank,) = ranks.fork([Start(verdict.describe, (root, name, out), ranks.clean_environment(), said)])
        wait([rank], HANG_SECONDS)
        if rank.status != 0:
            return {"problems": [f"verdict: {said.read_text()}"]}
        facts: dict[str, Any] = json.loads(out.read_text())
        return facts

    def _start(self, show: Show, root: Path, announced: int, seconds: float) -> Chapter:
        """One start of a run, from its first process to its last: what it told."""
        logs, checkpoints = root / "logs" / RUN, root / "checkpoints" / RUN
        before, trouble = story.newest_step(checkpoints), show.trouble
        sizes = {name: _size(logs / name) for name in ("events.jsonl", "train.log")}
        if trouble is not None:
            trouble.before(root)
            before = before if trouble.newest is None else trouble.newest
        show.run(["train", str(root / "job.yaml"), "--name", RUN], seconds)
        rows, broken = story.split_lines(_tail(logs / "events.jsonl", sizes["events.jsonl"]))
        chapter = Chapter(
            show.world, show.ranks, announced, before, story.newest_step(checkpoints), rows, broken,
            log=_tail(logs / "train.log", sizes["train.log"]),
            halves=any(s.place.startswith("events-half") for s in show.struck),
        )  # fmt: skip
        if trouble is not None:
            chapter.trouble, chapter.passing, chapter.refusal = trouble.kind, trouble.passes, trouble.refusal
            details = f"from {trouble.share:.2f} for {trouble.seconds:.1f} s" if trouble.passes else ""
            show.struck.append(Struck(trouble.kind, trouble.place, show.world, trouble.outcome, details))
        deaths = [rank.ended for rank in show.ranks if rank.killed]
        for struck in show.struck:
            struck.outcome = _outcome(chapter, struck, show.hung)
            if deaths and not show.hung and not show.fresh:
                struck.survivors_seconds = max(rank.ended for rank in show.ranks) - min(deaths)
        return chapter


def _groups(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Faults by start: one that lets the start go on shares it with the next."""
    groups: list[list[Fault]] = [[]]
    for fault in faults:
        groups[-1].append(fault)
        if not fault.passing:
            groups.append([])
    return [group for group in groups if group]


def _diary(show: Show, chapter: Chapter) -> str:
    faults = "; ".join(f"{s.kind} at {s.place} ({s.details}): {s.outcome}" for s in show.struck)
    ends = "hangs" if show.hung else f"statuses {[rank.status for rank in chapter.ranks]}"
    return (
        f"{chapter.world} ranks, {faults or 'left alone'}; {ends}, "
        f"step {chapter.newest_before} -> {chapter.newest_after}"
    )


def _outcome(chapter: Chapter, struck: Struck, hung: bool) -> str:
    if struck.outcome == "not reached":
        return "not reached"
    if hung:
        return "HANGS"
    if chapter.killed:
        return "died"
    if any(rank.status in (1, 2) for rank in chapter.ranks):
        return "refused" if chapter.refusal else "failed"
    return "stopped" if chapter.stopped else "went on"


def _best_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    best = -1.0
    for row in rows:
        if row["test_accuracy"] > best:
            best = row["test_accuracy"]
            yield row


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _make_images(folder: Path) -> None:
    """A small folder of images, ten classes, the same each time."""
    from PIL import Image

    pixels = random.Random(0).randbytes
    for split, count in plan.IMAGES.items():
        for label in range(10):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                path = folder / split / f"class{label}" / f"{number}.png"
                Image.frombytes("RGB", (32, 32), pixels(3 * 32 * 32)).save(path)
