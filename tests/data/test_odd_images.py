"""Folders of whatever files there are: the right pixels, or one error that names the file; the content decides."""

from __future__ import annotations

import io
import os
import socket
import struct
import tempfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torchvision.datasets.folder import pil_loader

from cifar_hpc.config.spec import CLASSES, DataSpec
from cifar_hpc.data import datasets
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.data.image_folder import LARGEST_IMAGE, decode, list_folder, read_image
from cifar_hpc.errors import SpecError

RANDOM = np.random.default_rng(0)
RGB = Image.fromarray(RANDOM.integers(0, 256, (32, 32, 3), np.uint8))
GREY = (64 * np.arange(1024)).reshape(32, 32).astype(">u2")  # 1,024 levels of 16 bits


def saved(kind: str, image: Image.Image = RGB, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(channels: int, kind: int) -> bytes:
    """A PNG of 16 bits a channel, all of which are GREY."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + np.stack([row] * channels, 1).astype(">u2").tobytes() for row in GREY)
    head = struct.pack(">IIBBBBB", 32, 32, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees; as torchvision, the pixels are taken as they are
    return saved("JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:], lossless=True)


# What torchvision's loader gives is right.
AS_TORCHVISION = {
    "palette": saved("PNG", RGB.convert("P")),
    "palette with transparency": saved("PNG", RGB.convert("P"), transparency=bytes(range(256))),
    "one transparent colour": saved("PNG", transparency=(0, 0, 0)),
    "1 bit": saved("PNG", RGB.convert("1")),
    "1 bit BMP": saved("BMP", RGB.convert("1")),
    "LA": saved("PNG", RGB.convert("LA")),
    "RGBA": saved("PNG", RGB.convert("RGBA")),
    "RGBA WebP": saved("WEBP", RGB.convert("RGBA"), lossless=True),
    "CMYK": saved("JPEG", RGB.convert("CMYK")),
    "YCbCr": saved("JPEG", RGB.convert("YCbCr")),
    "progressive": saved("JPEG", progressive=True),
    "turned by EXIF": rotated(),
    "animated WebP": animated("WEBP"),
    "animated PNG": animated("PNG"),
    "48 bits": png(3, 2),
    "64 bits": png(4, 6),
    "48 bits PPM": b"P6 32 32 65535\n" + np.stack([GREY] * 3, 2).astype(">u2").tobytes(),
    "text PPM": b"P3 32 32 255\n" + b" ".join(b"%d" % (n % 256) for n in range(3072)),
}


@pytest.mark.parametrize("content", AS_TORCHVISION.values(), ids=AS_TORCHVISION)
def test_pixels_are_torchvisions(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        expected = torch.from_numpy(np.array(pil_loader(str(path)))).permute(2, 0, 1)
    assert torch.equal(decode([path])[0], expected)


@pytest.mark.parametrize(
    ("content", "like"),
    [
        (saved("PNG", Image.fromarray(GREY.astype(np.uint16))), png(3, 2)),
        (png(1, 0), png(3, 2)),
        (png(2, 4), png(3, 2)),  # grey and alpha
        (b"P5 32 32 65535\n" + GREY.tobytes(), AS_TORCHVISION["48 bits PPM"]),
        (b"P2 32 32 65535\n" + b" ".join(b"%d" % n for n in GREY.flatten()), AS_TORCHVISION["48 bits PPM"]),
    ],
    ids=["PNG", "PNG by hand", "PNG with alpha", "PGM", "text PGM"],
)
def test_grey_of_16_bits_is_as_colours_of_16_bits(tmp_path: Path, content: bytes, like: bytes) -> None:
    for name, data in (("grey.png", content), ("colour.png", like)):
        (tmp_path / name).write_bytes(data)
    grey, colour = decode([tmp_path / "grey.png", tmp_path / "colour.png"])
    assert torch.equal(grey, colour)
    assert len(grey.unique()) == 256 and torch.equal(grey[0], grey[1])


def with_text(compressed: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 50_000_000 if compressed else "a" * (LARGEST_IMAGE + 1), zip=compressed)
    return saved("PNG", pnginfo=info)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "floats": (lambda: b"Pf 32 32 -1.0\n" + np.zeros(1024, "<f4").tobytes(), "its pixels are floats; allowed: whole"),
    "float TIFF": (lambda: saved("TIFF", RGB.convert("F")), "is not a readable image: cannot identify image file"),
    "LAB TIFF": (lambda: saved("TIFF", RGB.convert("LAB")), "cannot identify image file"),
    "animated GIF": (lambda: animated("GIF"), "cannot identify image file"),
    "empty": (lambda: b"", "cannot identify image file"),
    "text": (lambda: b"<svg></svg>", "cannot identify image file"),
    "cut JPEG": (lambda: saved("JPEG")[:-20], "is not a readable image: image file is truncated"),
    "cut PNG": (lambda: saved("PNG")[:2000], "truncated"),
    "cut BMP": (lambda: saved("BMP")[:-1], "truncated"),
    "cut WebP": (lambda: saved("WEBP")[:-20], "is not a readable image: "),
    "damaged PNG": (lambda: saved("PNG").replace(saved("PNG")[500:504], b"\0\0\0\0"), "is not a readable image: "),
    "large": (lambda: saved("PNG", Image.new("1", (10_000, 10_000))), "is 10000x10000 pixels; allowed: 32x32"),
    "bomb": (lambda: saved("PNG", Image.new("1", (14_000, 14_000))), "decompression bomb"),
    "text bomb": (lambda: with_text(True), "is not a readable image: Decompressed data too large"),
    "long text": (lambda: with_text(False), "holds more than 4,194,304 bytes; allowed: 32x32 pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_is_no_image_is_named(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(make())
    with pytest.raises(SpecError, match=message) as caught:
        decode([path])
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 400


# ------------------------------------------------------------------ folders


def draw(path: Path, value: int) -> None:
    """A picture whose file has the same size for every value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels: NDArray[np.uint8] = np.full((32, 32, 3), value, np.uint8)
    Image.fromarray(pixels).save(path, "BMP")


@pytest.fixture
def root() -> Iterator[Path]:
    """A project root that any user can enter, with one image of each class in images/{train,test}/class*/."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for split in ("train", "test"):
            for label in range(CLASSES):
                draw(Path(folder) / "images" / split / f"class {label}" / "a.bmp", label)
        yield Path(folder)


def load(root: Path, progress: datasets.Progress = lambda text: False) -> Dataset:
    return load_dataset(DataSpec(source="folder", root="images"), root, progress)


def refuse_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "pixels", lambda *_: pytest.fail("decoded again"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_another_image_of_the_same_size_and_time_is_seen(root: Path, split: str) -> None:
    before = load(root)
    path = root / "images" / split / "class 3" / "a.bmp"
    old = path.stat()
    draw(path, 200)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    images = {"train": load(root).train_images, "test": load(root).test_images}[split]
    assert int(images[3].max()) == 200
    assert int((before.train_images if split == "train" else before.test_images)[3].max()) == 3


def test_two_images_that_change_places_are_seen(root: Path) -> None:
    load(root)
    one, two = (root / "images" / "train" / f"class {n}" / "a.bmp" for n in (1, 2))
    one.rename(root / "away")
    two.rename(one)
    (root / "away").rename(two)
    assert load(root).train_images[:4, 0, 0, 0].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("seconds", [0, -(2**31), -1, 2**33, 1])
def test_a_date_says_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    first = load(root)
    for path in (root / "images").rglob("*.bmp"):
        os.utime(path, (seconds, seconds))
    refuse_to_decode(monkeypatch)
    assert torch.equal(load(root).train_images, first.train_images)


def test_an_image_that_changes_while_the_folder_is_read(root: Path) -> None:
    """The cache is of the images that were decoded, not of those before."""
    path = root / "images" / "train" / "class 3" / "a.bmp"
    changes = iter([lambda: draw(path, 99)])

    def change(text: str) -> bool:
        next(changes, lambda: None)()
        return False

    assert int(load(root, change).train_images[3].max()) == 99
    draw(path, 3)
    assert int(load(root).train_images[3].max()) == 3
    draw(path, 99)
    assert int(load(root).train_images[3].max()) == 99


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(saved("PNG"))
    read_image(path)
    tracemalloc.start()
    try:
        assert read_image(path) == path.read_bytes()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_links_are_followed_to_their_content(root: Path) -> None:
    folder = root / "images" / "train"
    (folder / "class 3").rename(root / "elsewhere")
    (folder / "class 3").symlink_to(root / "elsewhere")
    (folder / "class 4" / "b.bmp").symlink_to("../class 5/a.bmp")
    (folder / "class 4" / "c.bmp").hardlink_to(folder / "class 5" / "a.bmp")
    (root / "images").rename(root / "real")
    (root / "images").symlink_to("real")
    assert load(root).train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9]
    draw(root / "elsewhere" / "a.bmp", 77)
    assert int(load(root).train_images[3].max()) == 77


def test_names_are_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "images" / "train" / "class 3"
    for name in (b"a\nb.bmp", b"caf\xe9 $(touch x).BMP", "\u202egpj.bmp".encode(), b"-rf.bmp", b"x" * 250 + b".bmp"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123
            file.write((folder / "a.bmp").read_bytes())
    assert load(root).train_labels.tolist().count(3) == 6
    refuse_to_decode(monkeypatch)
    assert load(root).train_labels.tolist().count(3) == 6


def a_loop(folder: Path) -> Path:
    (folder / "b.bmp").symlink_to("b.bmp")
    return folder / "b.bmp"


def a_loop_of_folders(folder: Path) -> Path:
    (folder.parent / "loop").symlink_to("loop")
    return folder.parent / "loop"


def a_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "b.bmp"))
    return folder / "b.bmp"


@pytest.mark.parametrize("plant", [a_loop, a_loop_of_folders, a_socket])
def test_what_leads_nowhere_is_named(root: Path, plant: Callable[[Path], Path]) -> None:
    path = plant(root / "images" / "train" / "class 3")
    with pytest.raises(SpecError, match=r"^data\.root: .* (cannot be read|is no regular file)") as caught:
        list_folder(root / "images")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["b.tif", "b.PGM", "b.gif"])
def test_an_image_of_a_format_that_is_not_read_is_not_left_out_silently(root: Path, name: str) -> None:
    folder = root / "images" / "test" / "class 3"
    (folder / "notes.txt").write_text("no image")
    assert len(list_folder(root / "images")[0]["test"]) == CLASSES
    (folder / name).write_bytes(b"")
    with pytest.raises(SpecError, match=rf"class 3/{name} is not read; allowed: \.jpg .*HINT: convert it"):
        list_folder(root / "images")


def test_a_file_that_became_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(SpecError, match=r"a\.png: cannot be read: is no regular file but a FIFO"):
        decode([tmp_path / "a.png"])


# ------------------------------------------------------------------ permissions


@pytest.fixture
def somebody(root: Path) -> Iterator[None]:
    """The effective user is one whom permissions stop, and owns nothing but the project's root."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(root, 65534, 65534)
    pil_loader(str(root / "images" / "test" / "class 0" / "a.bmp"))  # imports what it needs
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("what", ["train/class 3/a.bmp", "train/class 3", "test", "."])
def test_what_may_not_be_read_is_named(root: Path, what: str, request: pytest.FixtureRequest) -> None:
    path = root / "images" / what
    mode = path.stat().st_mode
    path.chmod(0)
    request.getfixturevalue("somebody")
    with pytest.raises(SpecError, match=r"^data\.root: .* cannot be read: Permission denied\.") as caught:
        load(root)
    assert str(path) in str(caught.value)
    if os.geteuid() == os.getuid():
        path.chmod(mode)


def test_the_cache_of_a_folder_that_is_not_mine_is_in_the_project(
    root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (root / "images").chmod(0o555)
    request.getfixturevalue("somebody")
    first = load(root)
    assert len(list((root / "checkpoints" / ".data").iterdir())) == 1
    refuse_to_decode(monkeypatch)
    assert torch.equal(load(root).train_images, first.train_images)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_cache_folder_that_is_closed_does_not_matter(root: Path, mode: int, request: pytest.FixtureRequest) -> None:
    (root / "images" / ".cifar_hpc").mkdir()
    (root / "images" / ".cifar_hpc").chmod(mode)
    (root / "images").chmod(0o777)
    request.getfixturevalue("somebody")
    said: list[str] = []
    assert len(load(root, lambda text: bool(said.append(text))).train_images) == CLASSES
    assert [text for text in said if "WARNING data cache" in text and "cannot be written" in text]


def test_a_cache_that_is_not_mine_to_read_is_made_anew(root: Path, request: pytest.FixtureRequest) -> None:
    load(root)
    (cache,) = (root / "images" / ".cifar_hpc").iterdir()
    cache.chmod(0)
    request.getfixturevalue("somebody")
    said: list[str] = []
    assert load(root, lambda text: bool(said.append(text))).train_images[:, 0, 0, 0].tolist() == list(range(CLASSES))
    assert any("Permission denied" in text and "decoding again" in text for text in said)
