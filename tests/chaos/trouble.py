"""What befalls a start besides signals: storage that fails, folders that are lost, damaged files, ranks that differ.

Some troubles pass while a start runs, some are there for a whole start, and some are damages done between two starts.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tests.chaos.plan import deal

RUN = "run"  # the name of every run; each has a root of its own
ERRORS = ("ENOSPC", "EIO", "EROFS", "ESTALE")  # by the last one reading fails, too
PASSING = (*(f"{error} {folder}" for error in ERRORS for folder in ("logs", "checkpoints")),
           "lost logs", "lost checkpoints", "gone logs")  # fmt: skip
DAMAGES = ("truncated checkpoint", "flipped bits", "crafted checkpoint", "damaged index")
# A whole start is refused with these words.
REFUSALS = dict.fromkeys(("other data", "other precision", "other spec"), "the ranks do not agree")
REFUSALS["gone checkpoints"] = "holds no checkpoint any more"
ALL_BAD = "no checkpoint of the run is good"
PARTS = dict.fromkeys(ERRORS, "storage") | {"lost": "mount", "gone": "mount", "other": "ranks"}


@dataclass
class Trouble:
    """One trouble. lost: a file is in the folder's place, so that nothing can be written there; gone: nothing is.

    Attributes:
        share: how far into its start it begins, if it passes; 0 is before the start.
        seconds: how long it lasts then.
        shared: whether the faults of a start go with it.
        refusal: the words with which the start must be refused; empty if it must not.
        newest: the step of the newest good checkpoint, where a newer one was damaged.
    """

    kind: str
    world: int
    share: float
    seconds: float
    which: float
    shared: bool
    run: str = RUN
    root: Path = Path()
    refusal: str = ""
    newest: int | None = None
    outcome: str = "not reached"

    def __post_init__(self) -> None:
        self.place = PARTS.get(self.kind.split()[0], "files")  # the row of the report
        self.passes = self.kind in PASSING
        self.needs_files = self.kind in (*DAMAGES, "gone checkpoints")

    @property
    def folder(self) -> Path:
        """The folder of the run that it concerns."""
        return self.root / ("logs" if self.kind.endswith("logs") else "checkpoints") / self.run

    def environment(self) -> dict[str, str]:
        """What tells the ranks of it."""
        return {"CHAOS_TROUBLE": json.dumps([self.kind, str(self.root / "flag"), str(self.folder)])}

    def before(self, root: Path) -> None:
        """Do what is done before the start."""
        self.root = root
        files, told = sorted(self.folder.glob("step_*.pt")), root / "logs" / self.run / "events.jsonl"
        if self.kind == "gone checkpoints" and not (told.exists() and '"event": "checkpoint"' in told.read_text()):
            files = []  # killed before it had told of its first one
        if self.passes and self.share == 0:
            self.begin()
        elif not self.passes and (files or not self.needs_files):
            self.outcome, self.refusal = "struck", REFUSALS.get(self.kind, "")
            if self.kind == "gone checkpoints":
                self.folder.rename(root / "away")
            elif self.kind in DAMAGES:
                self._damage(files)

    def begin(self) -> None:
        """Let it begin."""
        self.outcome = "struck"
        if self.place == "storage":
            (self.root / "flag").touch()
        elif self.folder.exists():
            self.folder.rename(self.root / "away")
            if self.kind.startswith("lost"):
                self.folder.write_text("in the folder's place")
        else:
            self.outcome = "not reached"

    def end(self) -> None:
        """Let all be as before; what was written to the place of a lost folder meanwhile is hidden, and so is gone."""
        (self.root / "flag").unlink(missing_ok=True)
        while (self.root / "away").exists():
            if self.folder.is_file():
                self.folder.unlink()
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # made again meanwhile
                (self.root / "away").rename(self.folder)
        if self.refusal == ALL_BAD:  # from a backup
            (self.root / "backup").replace(max(self.folder.glob("step_*.pt")))

    def _damage(self, files: list[Path]) -> None:
        newest, rng = files[-1], random.Random(self.which)
        content, place = newest.read_bytes(), int(self.which * newest.stat().st_size)
        if self.kind == "damaged index":
            texts = ("", "{", "[]", '{"checkpoints": {"step_00000001.pt": 5}, "best": []}', "\0" * 300)
            (self.folder / "index.json").write_text(rng.choice(texts))
            return
        if self.kind == "crafted checkpoint":
            self.newest = int(newest.stem[5:])
            crafted = rng.choice(_crafted(self.root, content))
            (self.folder / f"step_{self.newest + 1:08d}.pt").write_bytes(crafted)
            return
        (self.root / "backup").write_bytes(content)
        steps, best = [int(path.stem[5:]) for path in files[:-1]], self.folder / "best.pt"
        if best.exists() and not best.samefile(newest):
            steps.append((json.loads((self.folder / "index.json").read_text())["best"] or {"step": 0})["step"])
        self.newest = max(steps, default=None)
        self.refusal = "" if steps else ALL_BAD
        with newest.open("r+b") as file:  # in place: best.pt may be the same file
            if self.kind == "truncated checkpoint":
                file.truncate(place)
            else:
                file.seek(place)
                file.write(bytes(byte ^ 0x55 for byte in content[place : place + 64]))


def _crafted(root: Path, newest: bytes) -> list[bytes]:
    """What somebody might put in as the newest checkpoint; code in it would make the folder `canary`."""
    code = f"cposix\nmkdir\n(V{root / 'canary'}\ntR.".encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/version", "3\n")
    others = [path.read_bytes() for path in root.parent.glob(f"reference-*/checkpoints/{RUN}/best.pt")]
    return [code, archive.getvalue(), random.Random(0).randbytes(100_000), newest, *others]


def draw(seed: int, number: int, count: int, worlds: Sequence[int]) -> Iterator[Trouble]:
    """The troubles of run `number`."""
    rng = random.Random(f"{seed}/troubles {number}")
    kinds = [kind for kind in (*PASSING, *DAMAGES, *REFUSALS) if max(worlds) > 1 or not kind.startswith("other")]
    for kind in islice(deal(f"{seed}/troubles", kinds), number * count, (number + 1) * count):
        world = rng.choice([world for world in worlds if world > 1 or not kind.startswith("other")])
        share, shared = (
            rng.choice((0.0, rng.random() * 0.7, rng.random() * 0.7)),
            kind not in REFUSALS and rng.random() < 0.5,
        )
        yield Trouble(kind, world, share, rng.uniform(0.1, 1.5), rng.random(), shared)


# ----------------------------------------------------------------------------------------- within a rank


def install() -> None:
    """In a rank: be ready for the trouble of its start."""
    kind, flag, folder = json.loads(os.environ.pop("CHAOS_TROUBLE", '[" ", "", ""]'))
    word, _, what = kind.partition(" ")
    if word in ERRORS:
        _fail(getattr(errno, word), flag, folder + os.sep, reads=word == "ESTALE")
    elif word == "other" and os.environ["RANK"] == "1":
        _differ(what)


def _fail(number: int, flag: str, folder: str, reads: bool) -> None:
    """Calls on files in `folder` fail while the file `flag` exists."""

    def check(path: Any) -> None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        if f"{os.fsdecode(path)}/".startswith(folder) and os.access(flag, os.F_OK):
            raise OSError(number, os.strerror(number), os.fsdecode(path))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and not isinstance(arguments[0], int)
        if event in calls or (opens and (reads or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
            check(arguments[0])

    def checked(call: Any) -> Any:
        return lambda descriptor, *arguments: (check(descriptor), call(descriptor, *arguments))[1]

    calls = {"os.rename", "os.link", "os.mkdir", "os.truncate"} | ({"os.listdir", "os.scandir"} if reads else set())
    calls |= {"os.remove"} if number != errno.ENOSPC else set()
    sys.addaudithook(audit)
    for name in ("write", "fsync", "pwrite", "ftruncate"):
        setattr(os, name, checked(getattr(os, name)))


def _differ(what: str) -> None:
    """This rank has other images, or another spec."""
    from cifar_hpc.training import attempt

    load, init = attempt.load_dataset, attempt.Attempt.__init__

    def other_images(*arguments: Any) -> Any:
        data = load(*arguments)
        data.train_images[0] ^= 1
        return data

    def other_spec(self: Any, context: Any) -> None:
        part, changes = ("optimizer", {"lr": 0.011}) if what == "spec" else ("train", {"amp": "fp32"})
        if what == "precision" and context.spec.train.amp == "fp32":
            changes = {"amp": "bf16"}
        changed = dataclasses.replace(getattr(context.spec, part), **changes)
        context.spec = dataclasses.replace(context.spec, **{part: changed})
        init(self, context)

    if what == "data":
        attempt.load_dataset = other_images
    else:
        attempt.Attempt.__init__ = other_spec  # type: ignore[method-assign]
