"""Folders of any number of classes and of any size: photographs, their turns and kinds, what is measured, errors."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_hpc.config.spec import DataSpec, ResourcesSpec, Spec
from cifar_hpc.data import datasets, image_folder
from cifar_hpc.data.datasets import Dataset, load_dataset, other_images
from cifar_hpc.data.image_folder import decode, list_folder, own_size
from cifar_hpc.data.info import CIFAR10, CIFAR10_MEAN, CIFAR10_STD, DatasetInfo
from cifar_hpc.data.sources import with_size
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.errors import SpecError
from cifar_hpc.launch.preflight import check_data

FLOWERS = ("daisy", "rose", "tulip")
FOLDER = DataSpec(source="folder", root="images")
RANDOM = np.random.default_rng(0)


def picture(width: int, height: int) -> Image.Image:
    """A picture without noise, of which no corner is like another."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], 2).astype(np.uint8))


def array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def make(root: Path, size: tuple[int, int] = (48, 48), splits: tuple[str, ...] = ("train", "test")) -> Path:
    """root/images/<split>/<flower>/{0,1}.png of random pixels."""
    for split in splits:
        for name in FLOWERS:
            for number in range(2):
                path = root / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(RANDOM.integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    return root / "images"


def same(one: Dataset, two: Dataset) -> bool:
    equal = (torch.equal(a, b) for a, b in zip(one.tensors.values(), two.tensors.values(), strict=True))
    return all(equal) and one.info == two.info


def refuse_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "pixels", lambda *_: pytest.fail("decoded again"))


# ------------------------------------------------------------------ the images' own size


def test_three_classes_of_48_pixels_are_loaded_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    spec = with_size(FOLDER, tmp_path)
    assert spec == dataclasses.replace(FOLDER, image_size=48)
    found = load_dataset(spec, tmp_path)
    assert found.train_images.shape == (6, 3, 48, 48) and found.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.info.classes, found.info.image_size) == (FLOWERS, 48)
    with Image.open(folder / "train" / "rose" / "1.png") as image:
        assert np.array_equal(found.train_images[3].numpy(), array(image))
    refuse_to_decode(monkeypatch)
    assert same(load_dataset(spec, tmp_path), found)
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_dataset(dataclasses.replace(spec, image_size=24), tmp_path)  # another size is another cache


def test_folders_of_32_pixels_keep_data_image_size_null(tmp_path: Path) -> None:
    make(tmp_path, (32, 32))
    assert with_size(FOLDER, tmp_path) == FOLDER
    assert load_dataset(FOLDER, tmp_path).info.image_size == 32


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((48, 47), "is 48x47 pixels and .*daisy/0.png is 48x48; allowed"),
        ((64, 64), "is 64x64 pixels and .*daisy/0.png is 48x48; allowed"),
        ((32, 32), "is 32x32 pixels and .*daisy/0.png is 48x48; allowed"),
    ],
)
def test_an_image_of_another_size_is_named_before_anything_is_queued(
    tmp_path: Path, size: tuple[int, int], words: str
) -> None:
    folder = make(tmp_path)
    picture(*size).save(folder / "test" / "tulip" / "1.png")
    with pytest.raises(SpecError, match=rf"^data\.root: .*test/tulip/1\.png {words}.*HINT: --set data\.image_size=64"):
        check_data(Spec(data=FOLDER), tmp_path)
    assert check_data(Spec(data=dataclasses.replace(FOLDER, image_size=40)), tmp_path)[0].size == 40


@pytest.mark.parametrize("size", [(64, 48), (3, 3), (1025, 1025)])
def test_a_first_image_that_gives_no_size_is_named(tmp_path: Path, size: tuple[int, int]) -> None:
    make(tmp_path, size)
    words = (
        rf"daisy/0\.png is {size[0]}x{size[1]} pixels; allowed without data\.image_size: squares of one size from 4 to"
    )
    with pytest.raises(SpecError, match=words):
        with_size(FOLDER, tmp_path)


def test_the_first_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "train" / "daisy" / "0.png").write_text("no image")
    with pytest.raises(SpecError, match=r"^data\.root: .*daisy/0\.png: is not a readable image"):
        own_size(list_folder(folder)[0]["train"])


# ------------------------------------------------------------------ resizing


@pytest.mark.parametrize("size", [(4000, 3000), (64, 64), (65, 64), (300, 77), (20, 90), (10, 10)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_are_cut_to_their_middle_and_resized(tmp_path: Path, size: tuple[int, int], kind: str) -> None:
    picture(*size).save(tmp_path / "a.jpg", kind, quality=95)
    with Image.open(tmp_path / "a.jpg") as file:
        image = file.convert("RGB")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BICUBIC)
    found = decode([tmp_path / "a.jpg"], 64)[0].numpy().astype(int)
    assert np.abs(found - array(square)).max() <= 6, "where the margin is odd, half a pixel apart"


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (48, 48)])
def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path, turn: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(*size).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = ImageOps.exif_transpose(image)
    expected = ImageOps.fit(upright, (48, 48), Image.Resampling.BICUBIC)
    found = decode([tmp_path / "a.jpg"], 48)[0].numpy().astype(int)
    assert np.abs(found - array(expected)).max() <= 8
    if size == (48, 48) and turn == 1:
        assert np.array_equal(found, array(upright))


def test_damaged_exif_data_do_not_matter(tmp_path: Path) -> None:
    picture(40, 40).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnothing")
    assert decode([tmp_path / "a.jpg"], 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_other_kinds_of_pictures_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = picture(90, 60).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert("CMYK" if mode == "CMYK" else "RGBA").convert(mode) if mode != "1" else grey.convert("1")
    image.save(tmp_path / "a.jpg", "JPEG" if mode == "CMYK" else "PNG")
    expected = ImageOps.fit(
        image.convert("RGB") if mode != "I;16" else grey.convert("RGB"), (24, 24), Image.Resampling.BICUBIC
    )
    found = decode([tmp_path / "a.jpg"], 24)[0].numpy().astype(int)
    assert np.abs(found - array(expected)).max() <= 6


def test_large_files_and_bombs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(SpecError, match=r"a\.png: is 9000x9000 pixels; allowed: 67,108,864 pixels"):
        decode([path], 64)
    Image.new("1", (14_000, 14_000)).save(path)
    with pytest.raises(SpecError, match=r"a\.png: is not a readable image: .*decompression bomb"):
        decode([path], 64)
    monkeypatch.setattr(image_folder, "LARGEST_PHOTO", 1000)
    path.write_bytes(bytes(1001))
    with pytest.raises(SpecError, match=r"a\.png: holds more than 1,000 bytes"):
        decode([path], 64)


def test_a_large_jpeg_is_never_decoded_as_a_whole(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 9_000), (9, 99, 199)).save(tmp_path / "a.jpg")
    assert decode([tmp_path / "a.jpg"], 64).flatten(2).float().mean(2)[0].tolist() == pytest.approx([9, 99, 199], abs=2)


def test_a_folder_of_photographs_is_resized_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, (31, 57))
    spec = dataclasses.replace(FOLDER, image_size=24)
    found = load_dataset(spec, tmp_path)
    files = list_folder(folder)[0]
    assert torch.equal(found.train_images, decode(files["train"], 24))
    assert torch.equal(found.test_images, decode(files["test"], 24))
    shutil.copytree(folder, tmp_path / "copy")
    refuse_to_decode(monkeypatch)
    assert same(load_dataset(dataclasses.replace(spec, root="copy"), tmp_path), found)


def test_an_image_that_changed_is_seen_in_any_size(tmp_path: Path) -> None:
    folder = make(tmp_path, (31, 57))
    spec = dataclasses.replace(FOLDER, image_size=24)
    before = load_dataset(spec, tmp_path)
    picture(31, 57).save(folder / "test" / "rose" / "0.png")
    after = load_dataset(spec, tmp_path)
    assert torch.equal(after.train_images, before.train_images)
    assert not torch.equal(after.test_images, before.test_images)


# ------------------------------------------------------------------ mean and deviation


def test_what_is_measured_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    spec = dataclasses.replace(FOLDER, image_size=48)
    found = load_dataset(spec, tmp_path)
    pixels = (found.train_images.double() / 255).transpose(0, 1).flatten(1)
    assert found.info.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert found.info.std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-12)
    monkeypatch.setattr(datasets, "_PART", 3 * 48 * 48)  # a part is one image
    assert datasets._statistics(found.train_images) == [*found.info.mean, *found.info.std]
    monkeypatch.setattr(datasets, "_statistics", lambda _: pytest.fail("measured again"))
    assert load_dataset(spec, tmp_path).info == found.info


def test_a_channel_that_is_the_same_everywhere_is_not_scaled() -> None:
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    assert datasets._statistics(images) == [0.2, 0.2, 0.2, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("size", "kept"), [(None, True), (32, True), (24, False)])
def test_a_folder_of_cifar10_keeps_its_numbers(tmp_path: Path, size: int | None, kept: bool) -> None:
    for split in ("train", "test"):
        for name in CIFAR10:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            picture(32, 32).save(tmp_path / "images" / split / name / "a.png")
    info = load_dataset(dataclasses.replace(FOLDER, image_size=size), tmp_path).info
    assert ((info.mean, info.std) == (CIFAR10_MEAN, CIFAR10_STD)) is kept and info.classes == CIFAR10


def test_a_cache_of_an_earlier_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name that it had, and no mean."""
    for split, count in {"train": 3, "test": 1}.items():
        for number in range(10 * count):
            path = tmp_path / "images" / split / f"class{number % 10}" / f"{number // 10}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 2, 3)).save(path)
    first = load_dataset(FOLDER, tmp_path)
    (cache,) = (tmp_path / "images" / ".cifar_hpc").iterdir()
    assert cache.name == "decoded-b6ec5a9aad003b70.pt"
    content = torch.load(cache, weights_only=True)
    del content["statistics"], content["digest"]
    torch.save(datasets.tensorfile.seal(content), cache)
    refuse_to_decode(monkeypatch)
    assert same(load_dataset(FOLDER, tmp_path), first)


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize("above", ["", "train"])
def test_class_folders_are_enough_with_data_holdout(tmp_path: Path, above: str) -> None:
    folder = make(tmp_path, splits=(above,))
    spec = dataclasses.replace(FOLDER, image_size=48, holdout=2)
    found = load_dataset(spec, tmp_path)
    assert (len(found.train_images), len(found.test_images), found.info.classes) == (4, 2, FLOWERS)
    pixels = [image.numpy().tobytes() for image in (*found.train_images, *found.test_images)]
    assert set(pixels) == {image.numpy().tobytes() for image in decode(sorted(folder.rglob("*.png")), 48)}
    assert same(load_dataset(spec, tmp_path), found)
    with pytest.raises(SpecError, match=r"^data\.root: .* HINT: data\.holdout=N tests on N of the training images"):
        check_data(Spec(data=FOLDER), tmp_path)


def one_class(folder: Path) -> None:
    for name in FLOWERS[1:]:
        for split in ("train", "test"):
            shutil.rmtree(folder / split / name)


def other_classes(folder: Path) -> None:
    (folder / "test" / "rose").rename(folder / "test" / "roses")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (one_class, "train has 1 class folder; allowed: 2 or more"),
        (other_classes, "differ; only in train: rose; only in test: roses"),
        (lambda folder: (folder / "train").rename(folder / "tain"), "train is no folder.*did you mean 'tain'"),
        (lambda folder: folder.rename(folder.with_name("fotos")), "images is no folder"),
    ],
    ids=["one", "other", "typo", "gone"],
)
def test_what_is_wrong_in_a_layout_is_named(tmp_path: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(make(tmp_path))
    with pytest.raises(SpecError, match=rf"^data\.root: .*{words}"):
        check_data(Spec(data=FOLDER), tmp_path)


# ------------------------------------------------------------------ before a submission


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dataclasses.replace(FOLDER, train_size=7), r"^data\.train_size: 7 is more than there are: 6 images"),
        (dataclasses.replace(FOLDER, holdout=6), r"^data\.holdout: 6 is not allowed; allowed: less than the 6"),
    ],
)
def test_too_many_images_are_refused_before_a_submission(tmp_path: Path, data: DataSpec, words: str) -> None:
    make(tmp_path)
    with pytest.raises(SpecError, match=words):
        check_data(Spec(data=data), tmp_path)


@pytest.mark.parametrize(("mem", "fits"), [("100K", False), ("200K", True), ("1", True), ("0", True), (None, True)])
def test_images_that_do_not_fit_into_the_memory_are_refused(tmp_path: Path, mem: str | None, fits: bool) -> None:
    make(tmp_path)  # 12 x 48 x 48 x 3 = 82,944 bytes
    spec = Spec(data=FOLDER, resources=ResourcesSpec(mem=mem, gpus_per_node=2))
    if fits:
        assert check_data(spec, tmp_path) == (dataclasses.replace(FOLDER, image_size=48), None)
    else:
        words = "mem: 100K is too little for 12 images of 48x48 pixels, 0.0 GB .* each process, of which a node has 2"
        with pytest.raises(SpecError, match=rf"^resources\.{words}"):
            check_data(spec, tmp_path)


def test_images_that_take_much_memory_are_told() -> None:
    spec = Spec(data=DataSpec(source="synthetic", image_size=384, train_size=10_000, test_size=100))
    assert check_data(spec, Path()) == (
        spec.data,
        "10,100 images of 384x384 pixels, 4.5 GB in the memory of each process",
    )


# ------------------------------------------------------------------ other sources, and images from elsewhere


def test_synthetic_images_are_the_same_in_32_pixels_and_resized_in_others() -> None:
    spec = DataSpec(source="synthetic", train_size=8, test_size=4)
    train, labels, _, _ = make_synthetic(8, 4)
    assert torch.equal(load_dataset(spec, Path()).train_images, train)
    large = load_dataset(dataclasses.replace(spec, image_size=40), Path())
    assert large.train_images.shape == (8, 3, 40, 40) and torch.equal(large.train_labels, labels)
    assert large.info.image_size == 40 and large.info.mean == CIFAR10_MEAN
    expected = Image.fromarray(train[3].permute(1, 2, 0).numpy()).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(large.train_images[3].numpy(), array(expected))


def test_images_to_evaluate_are_matched_to_a_run_of_three_classes(tmp_path: Path) -> None:
    folder = make(tmp_path, (60, 50), ("",))
    info = DatasetInfo(FLOWERS, 48)
    found = other_images(folder, info, resize=True)
    assert found.images.shape == (6, 3, 48, 48) and found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(SpecError, match=r"is 60x50 pixels; allowed: 32x32"):
        other_images(folder, info, resize=False)
    shutil.rmtree(folder / "rose")
    assert other_images(folder, info, resize=True).labels.tolist() == [0, 0, 2, 2], "not every class has images"
    (folder / "tulip").rename(folder / "tulpe")
    with pytest.raises(SpecError, match=r"2 classes, of which 'tulpe' is none of the run's 3 \(daisy, rose, tulip\)"):
        other_images(folder, info, resize=True)


def test_turned_pixels_of_a_png(tmp_path: Path) -> None:
    """A camera's turn counts for every format that has EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    picture(16, 16).save(file, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    assert np.array_equal(decode([tmp_path / "a.png"], 16)[0].numpy(), array(picture(16, 16).rotate(180)))
    assert math.prod(decode([tmp_path / "a.png"], 8).shape) == 192
