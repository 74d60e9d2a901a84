"""Images from a folder, from torchvision's CIFAR-10 and drawn: each thing that can be wrong is named."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import leftovers
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import pil_loader

from cifar_hpc import tensorfile
from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data import cifar as files
from cifar_hpc.data import datasets as data
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.files import replacing

CLASSES = [f"class{n}" for n in range(10)]
FOLDER = DataSpec(source="folder", root="images")


def draw(path: Path, value: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 7)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project root with images/{train,test}/class0..9/*.png; each image has its label's colour."""
    for label, name in enumerate(CLASSES):
        for number in range(3):
            draw(tmp_path / "images" / "train" / name / f"{number}.png", label)
        draw(tmp_path / "images" / "test" / name / "0.png", label)
    return tmp_path


def same(one: Dataset, two: Dataset) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors.values(), two.tensors.values(), strict=True))


def test_folder(root: Path) -> None:
    loaded = load_dataset(FOLDER, root)
    assert (loaded.train_images.shape, loaded.train_images.dtype) == ((30, 3, 32, 32), torch.uint8)
    assert (loaded.test_labels.tolist(), loaded.test_labels.dtype) == (list(range(10)), torch.int64)
    for images, labels in ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels)):
        expected = torch.stack([labels, 2 * labels, torch.full_like(labels, 7)], 1)[:, :, None, None]
        assert torch.equal(images.long(), expected.expand(-1, -1, 32, 32))
    assert same(loaded, load_dataset(DataSpec(source="folder", root=str(root / "images")), Path("/nowhere")))


def small(root: Path) -> Path:
    draw(root / "images" / "train" / "class3" / "1.png", 3, (32, 31))
    return root / "images" / "train" / "class3" / "1.png"


def cut(root: Path) -> Path:
    path = root / "images" / "test" / "class9" / "0.png"
    os.truncate(path, 60)
    return path


def text(root: Path) -> Path:
    path = root / "images" / "train" / "class0" / "2.png"
    path.write_text("no image")
    return path


def no_class(root: Path) -> Path:
    (root / "images" / "train" / "class4").rename(root / "class4")
    return root / "images"


def other_class(root: Path) -> Path:
    (root / "images" / "test" / "class4").rename(root / "images" / "test" / "klass4")
    return root / "images"


def empty_class(root: Path) -> Path:
    path = root / "images" / "test" / "class4"
    (path / "0.png").rename(path / "0.txt")
    return path


def no_split(root: Path) -> Path:
    (root / "images" / "test").rename(root / "images" / "tests")
    return root / "images" / "test"


def no_folder(root: Path) -> Path:
    (root / "images").rename(root / "image")
    return root / "images"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (small, r"is 32x31 pixels; allowed: 32x32\. HINT: --set data\.image_size=64"),
        (cut, "is not a readable image"),
        (text, "is not a readable image"),
        (no_class, "train and .*test differ; only in test: class4"),
        (other_class, "differ; only in train: class4; only in test: klass4"),
        (empty_class, "holds no image"),
        (no_split, "is no folder; .*did you mean 'tests'"),
        (no_folder, "images is no folder; .*did you mean 'image'"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(root: Path, spoil: Any, message: str) -> None:
    path = spoil(root)
    with pytest.raises(SpecError, match=message) as caught:
        load_dataset(FOLDER, root)
    assert str(caught.value).startswith("data.root: ")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP", "PPM", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_pixels_are_those_of_torchvisions_loader(root: Path, kind: str, mode: str) -> None:
    path = root / "images" / "train" / "class0" / "0.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)
    expected = torch.from_numpy(np.array(pil_loader(str(path)))).permute(2, 0, 1)
    assert torch.equal(load_dataset(FOLDER, root).train_images[0], expected)


@pytest.mark.parametrize("kind", ["EPS", "GIF"])
def test_an_image_of_another_format_than_the_suffixes_is_not_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was started"))
    Image.new("RGB", (32, 32)).save(root / "images" / "train" / "class0" / "0.png", kind)
    with pytest.raises(SpecError, match=r"class0/0\.png: is not a readable image: cannot identify"):
        load_dataset(FOLDER, root)


def test_the_second_start_reads_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset(FOLDER, root)
    monkeypatch.setattr(data, "pixels", lambda *_: pytest.fail("decoded again"))
    assert same(load_dataset(FOLDER, root), first)
    draw(root / "images" / "train" / "class0" / "0.png", 99)
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_dataset(FOLDER, root)


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "renamed"])
def test_a_change_of_any_file_is_seen(root: Path, change: str) -> None:
    before = load_dataset(FOLDER, root)
    folder = root / "images" / "train" / "class0"
    if change == "replaced":  # by an image of the same length
        size = (folder / "0.png").stat().st_size
        draw(folder / "0.png", 1)
        assert (folder / "0.png").stat().st_size == size
    elif change == "added":
        draw(folder / "9.png", 0)
    elif change == "removed":
        (folder / "2.png").unlink()
    else:
        (folder / "2.png").rename(root / "images" / "train" / "class1" / "x.png")
    assert not same(load_dataset(FOLDER, root), before)


def flipped(cache: Path) -> None:
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 16  # a pixel
    cache.write_bytes(content)


def resealed(cache: Path) -> None:
    """Other pixels under right sums of the records: the digest is what is left to notice it."""
    content = torch.load(cache, weights_only=True)
    content["train_images"][0, 0, 0, 0] ^= 1
    torch.save(content, cache)


def renamed(cache: Path) -> None:
    """The cache of another folder."""
    content = torch.load(cache, weights_only=True)
    del content["digest"]
    torch.save(tensorfile.seal({**content, "name": "decoded-0.pt"}), cache)


def unsealed(cache: Path) -> None:
    """As an earlier version wrote them."""
    content = torch.load(cache, weights_only=True)
    torch.save({k: v for k, v in content.items() if k not in ("name", "digest")}, cache)


def fifo(cache: Path) -> None:
    cache.unlink()
    os.mkfifo(cache)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def evil(cache: Path) -> None:
    torch.save({"train_images": Evil()}, cache)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cache: os.truncate(cache, 100), "damaged or cut short"),
        (lambda cache: os.truncate(cache, 0), "empty"),
        (flipped, "the sum of its record .* is wrong"),
        (resealed, "does not match its digest"),
        (renamed, "not the decoded images of this folder"),
        (unsealed, "not the decoded images of this folder"),
        (lambda cache: cache.write_text("text"), "no file of torch.save"),
        (fifo, "a FIFO"),
        (evil, r"holds code \(pickle globals: posix\.mkdir\), which was not executed"),
        (lambda cache: cache.write_bytes(pickle.dumps(Evil())), "a bare pickle.*nothing in it was executed"),
    ],
    ids="cut empty flipped resealed renamed unsealed text FIFO evil bare".split(),
)
def test_a_damaged_or_foreign_cache_is_named_and_made_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str
) -> None:
    monkeypatch.chdir(root)
    first = load_dataset(FOLDER, root)
    (cache,) = (root / "images" / ".cifar_hpc").iterdir()
    spoil(cache)
    said: list[str] = []
    assert same(load_dataset(FOLDER, root, lambda text: bool(said.append(text))), first)
    (line,) = [text for text in said if str(cache) in text]
    assert re.search(rf"WARNING data cache .*: .*{message}.*; decoding again", line)
    assert not (root / "evil").exists()
    monkeypatch.setattr(data, "pixels", lambda *_: pytest.fail("decoded again"))
    assert same(load_dataset(FOLDER, root), first)


def test_the_half_cache_of_a_killed_process_is_removed_and_a_living_one_is_left(root: Path) -> None:
    load_dataset(FOLDER, root)
    (cache,) = (root / "images" / ".cifar_hpc").iterdir()
    (cache.parent / f".{cache.name}.77.tmp").write_bytes(b"half")
    with replacing(cache.with_name("decoded-of-another-run.pt")):
        assert len(leftovers(root)) == 2
        load_dataset(FOLDER, root)
        assert len(leftovers(root)) == 1
    assert leftovers(root) == []


def test_a_cache_that_is_changed_after_it_was_read_changes_no_images(root: Path) -> None:
    load_dataset(FOLDER, root)
    loaded = load_dataset(FOLDER, root)
    (cache,) = (root / "images" / ".cifar_hpc").iterdir()
    before = loaded.train_images.clone()
    with cache.open("r+b") as file:
        file.write(b"\xff" * cache.stat().st_size)
    assert torch.equal(loaded.train_images, before)


def test_a_cache_that_cannot_be_written_does_not_matter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    said: list[str] = []
    assert len(load_dataset(FOLDER, root, lambda text: bool(said.append(text))).train_images) == 30
    assert any("cannot be written" in text for text in said)
    assert list((root / "images" / ".cifar_hpc").iterdir()) == []


def test_reading_can_be_left(root: Path) -> None:
    with pytest.raises(Interrupted):
        load_dataset(FOLDER, root, lambda text: True)


def test_the_chosen_images_are_fixed(root: Path) -> None:
    def choose(size: int) -> torch.Tensor:
        return load_dataset(DataSpec(source="folder", root="images", train_size=size, test_size=4), root).train_labels

    assert choose(12).tolist() == [1, 3, 4, 5, 5, 6, 7, 7, 8, 8, 9, 9], "the choice of a run must never change"
    assert torch.equal(choose(30), load_dataset(FOLDER, root).train_labels)


@pytest.mark.parametrize("key", ["train_size", "test_size"])
def test_more_images_than_there_are(root: Path, key: str) -> None:
    with pytest.raises(SpecError, match=rf"^data\.{key}: 31 is more than there are: (30|10) images"):
        load_dataset(DataSpec(source="folder", root="images", **{key: 31}), root)


def by_pixels(images: torch.Tensor, labels: torch.Tensor) -> dict[bytes, int]:
    return {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def test_images_that_are_held_out_take_the_place_of_the_test_images() -> None:
    whole = load_dataset(DataSpec(source="synthetic", train_size=50, test_size=10), Path("/nowhere"))
    tuned = load_dataset(DataSpec(source="synthetic", train_size=50, holdout=20), Path("/nowhere"))
    assert (len(tuned.train_images), len(tuned.test_images)) == (30, 20)
    known = by_pixels(whole.train_images, whole.train_labels)
    kept = by_pixels(tuned.train_images, tuned.train_labels)
    held = by_pixels(tuned.test_images, tuned.test_labels)
    assert kept | held == known
    assert not kept.keys() & held.keys()
    assert same(tuned, load_dataset(DataSpec(source="synthetic", train_size=50, holdout=20), Path("/elsewhere")))


def test_more_held_out_than_there_are() -> None:
    with pytest.raises(SpecError, match=r"data.holdout: 50 is not allowed; allowed: less than the 50"):
        load_dataset(DataSpec(source="synthetic", train_size=50, holdout=50), Path("/nowhere"))


def test_synthetic() -> None:
    loaded = load_dataset(DataSpec(source="synthetic", train_size=20, test_size=10), Path("/nowhere"))
    assert loaded.train_images.shape == (20, 3, 32, 32)
    assert same(loaded, load_dataset(DataSpec(source="synthetic", train_size=20, test_size=10), Path("/elsewhere")))


# ------------------------------------------------------------------ CIFAR-10


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of 2 images a file whose md5 sums count as the right ones, for torchvision, too."""
    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        blob = pickle.dumps(content)
        (base / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch(number: int) -> dict[str, Any]:
        pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) + number
        return {"data": (pixels % 251).astype(np.uint8), "labels": [number, number + 1]}

    train = [write(f"data_batch_{n}", batch(n)) for n in range(1, 6)]
    test = [write("test_batch", batch(7))]
    name, md5 = write("batches.meta", {"label_names": CLASSES})
    fake = replace(files.SETS["cifar10"], train=dict(train), test=dict(test), meta={name: md5})
    monkeypatch.setitem(files.SETS, "cifar10", fake)
    meta = {"filename": name, "key": "label_names", "md5": md5}
    for key, value in {"train_list": train, "test_list": test, "meta": meta}.items():
        monkeypatch.setattr(CIFAR10, key, value)
    return tmp_path


@pytest.mark.parametrize("theirs", [CIFAR10, CIFAR100])
def test_the_files_are_torchvisions(theirs: type[CIFAR10]) -> None:
    ours = files.SETS[theirs.__name__.lower()]
    assert (theirs.__name__, theirs.base_folder) == (ours.name, ours.folder)
    assert (theirs.filename, theirs.tgz_md5) == (ours.archive, ours.archive_md5)
    assert dict(theirs.train_list) == ours.train
    assert dict(theirs.test_list) == ours.test
    assert {theirs.meta["filename"]: theirs.meta["md5"]} == ours.meta and theirs.meta["key"] == ours.classes


def test_cifar10_as_torchvision_reads_it(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [CIFAR10(str(cifar / "data"), train=train) for train in (True, False)]
    monkeypatch.setitem(sys.modules, "torchvision", None)  # whoever imports it now gets an ImportError
    loaded = load_dataset(DataSpec(source="cifar10"), cifar)
    for images, labels, their in zip(
        (loaded.train_images, loaded.test_images), (loaded.train_labels, loaded.test_labels), theirs, strict=True
    ):
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), their.data)
        assert labels.tolist() == their.targets


def test_cifar10(cifar: Path) -> None:
    loaded = load_dataset(DataSpec(source="cifar10"), cifar)
    assert loaded.train_labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert loaded.test_labels.tolist() == [7, 8]
    assert (loaded.train_images.shape, loaded.train_images.dtype) == ((10, 3, 32, 32), torch.uint8)
    assert loaded.train_images.is_contiguous()
    assert loaded.train_images[0].flatten()[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_bad_file_of_cifar10_is_named(cifar: Path, name: str, damage: str) -> None:
    path = cifar / "data" / "cifar-10-batches-py" / name
    if damage == "cut":
        os.truncate(path, 20)
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    message = "is missing" if damage == "missing" else "is truncated or not the original"
    with pytest.raises(SpecError, match=message) as caught:
        load_dataset(DataSpec(source="cifar10"), cifar)
    assert str(path) in str(caught.value)
    with pytest.raises(SpecError, match=message):
        files.verify(files.SETS["cifar10"], cifar / "data")


def test_what_is_no_file_is_not_the_original(cifar: Path) -> None:
    path = cifar / "data" / "cifar-10-batches-py" / "test_batch"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SpecError, match="is truncated or not the original"):
        load_dataset(DataSpec(source="cifar10"), cifar)


def test_a_failed_download_says_what_else_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, root: str, **_: object) -> None:
        raise RuntimeError("<urlopen error [Errno -3]\nTemporary failure in name resolution>")

    monkeypatch.setattr(CIFAR10, "__init__", fail)
    with pytest.raises(SpecError, match=r"download failed: .*Errno -3\] Temporary.*HINT: .*data\.source=synthetic"):
        files.fetch(files.SETS["cifar10"], tmp_path / "data")


def test_what_is_whole_is_not_downloaded(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "__init__", lambda *_, **__: pytest.fail("downloaded"))
    files.fetch(files.SETS["cifar10"], cifar / "data")
    files.verify(files.SETS["cifar10"], cifar / "data")


def test_cifar100_has_its_fine_labels_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CIFAR-100 of few images, whose md5 sums count as the right ones."""
    ours, names = files.SETS["cifar100"], [f"fine {n}" for n in range(100)]
    base = tmp_path / "data" / ours.folder
    base.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> dict[str, str]:
        blob = pickle.dumps(content)
        (base / name).write_bytes(blob)
        return {name: hashlib.md5(blob).hexdigest()}

    def batch(labels: list[int]) -> dict[str, Any]:
        pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3072), np.uint8)
        return {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * len(labels)}

    fake = replace(
        ours,
        train=write("train", batch([99, 0, 57])),
        test=write("test", batch([3, 98])),
        meta=write("meta", {"fine_label_names": names, "coarse_label_names": ["all"]}),
    )
    monkeypatch.setitem(files.SETS, "cifar100", fake)
    found = load_dataset(DataSpec(source="cifar100"), tmp_path)
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([99, 0, 57], [3, 98])
    assert found.train_images.shape == (3, 3, 32, 32) and found.info.classes == tuple(names)
    pixels = (found.train_images.double() / 255).transpose(0, 1).flatten(1)
    assert found.info.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    large = load_dataset(DataSpec(source="cifar100", image_size=48), tmp_path)
    assert large.test_images.shape == (2, 3, 48, 48) and large.info.image_size == 48
    other = data.other_images(tmp_path / "data", DatasetInfo(tuple(names)), resize=False)
    assert (other.labels.tolist(), other.source) == ([3, 98], f"CIFAR-100 in {tmp_path / 'data'}")
    (base / "train").write_bytes(b"damaged")
    with pytest.raises(SpecError, match=r"^data\.root: .*cifar-100-python/train is truncated or not the original"):
        files.verify(fake, tmp_path / "data")
