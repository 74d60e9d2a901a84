"""A folder of images that has not changed is not read again; and no change of an image goes unseen."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data import datasets as data
from cifar_hpc.data.datasets import Dataset, load_dataset

PER_CLASS = {"train": 3, "test": 1}
COUNT = 10 * sum(PER_CLASS.values())


class Folder:
    """A folder of images, and the files of it whose content was read."""

    def __init__(self, root: Path) -> None:
        self.root, self.read, self.said = root, list[Path](), list[str]()
        for split, count in PER_CLASS.items():
            for number in range(10 * count):
                draw(root / "images" / split / f"class{number % 10}" / f"{number // 10}.bmp", number)

    def load(self, images: str = "images", train: int | None = None, test: int | None = None) -> Dataset:
        self.read.clear()
        self.said.clear()
        spec = DataSpec(source="folder", root=images, train_size=train, test_size=test)
        return load_dataset(spec, self.root, lambda text: bool(self.said.append(text)))


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value, 2, 3)).save(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    made, read = Folder(tmp_path), data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, size: (made.read.append(path), read(path, size))[1])
    return made


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the clock by which files have been left alone go ahead by two minutes."""
    now = time.time_ns
    return lambda: monkeypatch.setattr(data.time, "time_ns", lambda: now() + 120 * 10**9)


def same(one: Dataset, two: Dataset) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors.values(), two.tensors.values(), strict=True))


def test_files_that_nobody_has_touched_are_not_read_again(folder: Folder, later: Callable[[], None]) -> None:
    later()
    first = folder.load()
    assert len(folder.read) == COUNT, "there is no cache to compare with"
    assert same(folder.load(), first) and folder.read == []


def test_files_that_changed_a_moment_ago_are_read_until_they_have_been_left_alone(
    folder: Folder, later: Callable[[], None]
) -> None:
    first = folder.load()
    assert same(folder.load(), first) and len(folder.read) == COUNT
    later()
    assert same(folder.load(), first) and len(folder.read) == COUNT
    assert same(folder.load(), first) and folder.read == []


def overwritten(path: Path) -> None:
    draw(path, 99)


def replaced(path: Path) -> None:
    draw(path.with_name("new.bmp"), 99)
    path.with_name("new.bmp").replace(path)


def swapped(path: Path) -> None:
    """Of two classes: all of their files keep their sizes, times and inodes, but for the folders' names."""
    one, two, spare = path.parent, path.parent.with_name("class1"), path.parents[1] / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


@pytest.mark.parametrize("change", [overwritten, replaced, swapped])
def test_an_image_of_the_same_size_and_time_as_before_is_seen(
    folder: Folder, later: Callable[[], None], change: Callable[[Path], None]
) -> None:
    later()
    first, path = folder.load(), folder.root / "images" / "train" / "class0" / "0.bmp"
    before = path.stat()
    change(path)
    for file in (folder.root / "images").rglob("*.bmp"):
        if file.stat().st_mtime_ns > before.st_mtime_ns:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = folder.load()
    assert path.stat().st_size == before.st_size and not torch.equal(after.train_images, first.train_images)
    assert same(folder.load(), after) and folder.read == []


def test_the_content_decides_about_a_copy(folder: Folder, later: Callable[[], None]) -> None:
    later()
    first = folder.load()
    shutil.copytree(folder.root / "images", folder.root / "copy")  # with the times of the files
    assert same(folder.load("copy"), first) and len(folder.read) == COUNT, "compared, and read from the cache"
    assert same(folder.load("copy"), first) and folder.read == []


@pytest.mark.parametrize("text", ["", "0" * 64, "../../evil", "\udcff"])
def test_a_damaged_record_of_what_is_known_gives_no_other_images(
    folder: Folder, later: Callable[[], None], text: str
) -> None:
    later()
    first = folder.load()
    (known,) = (folder.root / "images" / ".cifar_hpc").glob("known-*")
    known.write_bytes(text.encode(errors="surrogateescape"))
    assert same(folder.load(), first)


def test_only_the_images_that_are_asked_for_are_read(folder: Folder) -> None:
    every, few = folder.load(), folder.load(train=7, test=2)
    assert len(set(folder.read)) == 9 and any("decoding 9 images in " in text for text in folder.said)
    expected = data._choose(every.train_images, every.train_labels, 7)
    assert torch.equal(few.train_images, expected[0]) and torch.equal(few.train_labels, expected[1])


def test_the_log_says_how_far_decoding_is(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SAY_SECONDS", -1.0)
    monkeypatch.setattr(data, "_READ_BY_EACH", 1)
    folder.load()
    assert [text for text in folder.said if text.startswith("decoding images")] == [
        f"decoding images: {count} of 40" for count in (16, 32, 40)
    ]
