"""The blocks of docs/extending.md, each run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PROJECT
from PIL import Image
from processes import command

pytestmark = pytest.mark.process
PAGE = PROJECT / "docs" / "extending.md"
BLOCKS = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))
SMALL = (
    "train.epochs=1", "train.batch_size=16", "train.shards=2", "train.device=cpu", "train.amp=fp32",
    "train.cpu_threads=1", "resources.gpus_per_node=0",
)  # fmt: skip
SYNTHETIC = ("data.train_size=64", "data.test_size=20")
TOY = ("model.blocks=[1]", "model.widths=[16]", "model.stem_width=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("extending")
    for name, text in BLOCKS.items():
        (folder / name).write_text(text)
    for number, name in enumerate(("cat", "dog", "horse")):
        (folder / "photos" / name).mkdir(parents=True)
        for image in range(8):
            Image.new("RGB", (90 + image, 70), (80 * number, 10 * image, 99)).save(
                folder / "photos" / name / f"{image}.jpg"
            )
    yield folder


def train(folder: Path, job: str, *overrides: str, name: str) -> str:
    words = [word for override in (*SMALL, *overrides) for word in ("--set", override)]
    status, output = command(folder, "train", str(folder / job), "--name", name, *words)
    assert status == 0, output
    return output


def test_all_blocks_are_short_and_named() -> None:
    assert sorted(BLOCKS) == [
        "adamw.yaml",
        "colours.yaml",
        "mydata.py",
        "mynets.py",
        "photos.yaml",
        "small.yaml",
        "tuned.yaml",
    ]
    assert max(len(text.splitlines()) for text in BLOCKS.values()) <= 20
    assert PAGE.read_text().count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize(
    ("job", "overrides"),
    [
        ("small.yaml", SYNTHETIC),
        ("photos.yaml", ("data.root={}/photos",)),
        ("colours.yaml", TOY),
        ("adamw.yaml", (*SYNTHETIC, *TOY)),
    ],
)
def test_each_job_trains(folder: Path, job: str, overrides: tuple[str, ...]) -> None:
    name = f"{Path(job).stem}-run"
    assert "FINISHED 1 epoch" in train(folder, job, *(word.format(folder) for word in overrides), name=name)
    assert command(folder, "evaluate", name)[0] == 0


def test_fine_tuning(folder: Path) -> None:
    train(folder, "adamw.yaml", *SYNTHETIC, *TOY, name="begun")
    output = train(folder, "tuned.yaml", *SYNTHETIC, *TOY, "model.init_from=begun", name="tuned")
    assert re.search(r"initialised from \S+best.pt: (\d+) of \1 tensors", output)


@pytest.mark.parametrize("job", sorted(path.name for path in (PROJECT / "jobs" / "examples").glob("*.yaml")))
def test_the_examples_train(folder: Path, job: str) -> None:
    root = f"data.root={folder}/photos"
    own = (root, "data.holdout=6") if job == "photos.yaml" else ("data.source=synthetic", *SYNTHETIC)
    words = [word for override in (*SMALL, "schedule.warmup_epochs=0", *own) for word in ("--set", override)]
    status, output = command(folder, "train", str(PROJECT / "jobs" / "examples" / job), "--name", f"{job}-x", *words)
    assert status == 0 and "FINISHED 1 epoch" in output, output


def test_every_key_and_file_that_it_names_is_there() -> None:
    text = PAGE.read_text()
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (PAGE.parent / path).exists(), path
