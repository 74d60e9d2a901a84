"""Images from folders, array files and pickles: the same pixels whichever way, a named error for everything else."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_hpc.data import image_input
from cifar_hpc.data.image_folder import decode
from cifar_hpc.data.image_input import ImageInput
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.errors import SpecError

IMAGES = make_synthetic(0, 12)[2]
ARRAY = IMAGES.numpy()


def open_images(path: Path) -> ImageInput:
    return image_input.open_images(path, DatasetInfo())


def whole(found: ImageInput) -> torch.Tensor:
    """All images, read in two parts."""
    return torch.cat([found.read(0, 5), found.read(5, len(found.ids))])


def save_png(path: Path, image: torch.Tensor) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@pytest.mark.parametrize("layout", ["planes", "pixels", "rows"])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "pickle"])
def test_arrays_of_every_layout_in_every_file_are_the_same_images(tmp_path: Path, layout: str, kind: str) -> None:
    array = {"planes": ARRAY, "pixels": ARRAY.transpose(0, 2, 3, 1), "rows": ARRAY.reshape(12, 3072)}[layout]
    path, ids = tmp_path / "images", np.arange(100, 112)
    with path.open("wb") as file:  # the name says nothing
        if kind == "npy":
            np.save(file, array)
        elif kind == "pickle":
            pickle.dump({b"data": array, b"ids": ids, b"labels": [0] * 12}, file)
        else:
            (np.savez if kind == "npz" else np.savez_compressed)(file, data=array, ids=ids, labels=ids)
    found = open_images(path)
    assert torch.equal(whole(found), IMAGES)
    assert found.ids == [str(i) for i in (range(12) if kind == "npy" else ids)]
    assert found.left_out == 0


def test_a_folder_is_read_in_natural_order_as_training_reads_it(tmp_path: Path) -> None:
    for number, image in enumerate(IMAGES, 1):
        save_png(tmp_path / f"{number}.png", image)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    found = open_images(tmp_path)
    assert found.ids == [str(n) for n in range(1, 13)]
    assert found.left_out == 2
    assert torch.equal(whole(found), IMAGES)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_kinds_of_images_become_rgb(tmp_path: Path, mode: str) -> None:
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import pil_to_tensor

    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).convert(mode).save(path)
    assert torch.equal(decode([path])[0], pil_to_tensor(pil_loader(str(path))))


def test_digits_that_are_none_of_ascii_are_text(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "²1.png", "a².png", "٣.png"):
        save_png(tmp_path / name, IMAGES[0])
    assert open_images(tmp_path).ids == ["9", "10", "a²", "²1", "٣"]


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF"])
def test_only_the_formats_of_the_suffixes_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save(path, kind)
    with pytest.raises(SpecError, match=r"a\.png: is not a readable image: cannot identify"):
        decode([path])


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP", "PPM", "PNG"])
def test_the_suffix_may_be_another_ones(tmp_path: Path, kind: str) -> None:
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import pil_to_tensor

    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save(path, kind)
    assert torch.equal(decode([path])[0], pil_to_tensor(pil_loader(str(path))))


def test_ids_may_be_text(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(pickle.dumps({"data": ARRAY, "ids": [b"a", "\u00e4", *range(10)]}))
    assert open_images(path).ids[:3] == ["a", "\u00e4", "0"]


def test_a_large_npy_is_not_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", ARRAY)
    monkeypatch.setattr(image_input, "LARGEST_BYTES", 1000)
    assert torch.equal(whole(open_images(tmp_path / "x.npy")), IMAGES)
    np.savez_compressed(tmp_path / "x.npz", data=np.zeros_like(ARRAY))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"data": ARRAY}))
    for name in ("x.npz", "x.pkl"):
        with pytest.raises(SpecError, match=r"read as a whole\. HINT: a \.npy"):
            open_images(tmp_path / name)


def refused(path: Path) -> str:
    with pytest.raises(SpecError) as raised:
        open_images(path).read(0, 1)
    assert str(raised.value).startswith(f"{path}"), str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (ARRAY.astype(np.float32) / 255, "images are float32; allowed: uint8.*255 \\* images"),
        (ARRAY.astype(np.int64), r"images are int64; allowed: uint8.*astype\('uint8'\)"),
        (ARRAY[0], r"of shape \[3, 32, 32\]; allowed: \[N, 32, 32, 3\].*image\[None\]"),
        (ARRAY[:, :, :28, :28], r"of shape \[12, 3, 28, 28\]"),
        (ARRAY[:0], "holds no image"),
        (np.uint8(3), r"of shape \[\]"),
        (np.array([{}]), "cannot be read as an array: .*Python objects"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: Any, words: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, array)
    assert re.search(words, refused(path))


def test_files_that_are_none_of_these(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert "there is no such file or folder; allowed: a .npy" in refused(path)
    for content, words in [
        (b"", "it is empty"),
        (b"hello", "it begins with b'hello'"),
        (b"\x93NUMPY\x01\x00", "cannot be read as an array"),
        (b"PK\3\4...", "cannot be read as arrays"),
        (pickle.dumps({"labels": [1]}), "without an array called data; it holds: labels"),
        (pickle.dumps({"data": ARRAY, "ids": [1, 2]}), "has 12 images, but 2 ids"),
        (pickle.dumps({"data": ARRAY, "ids": 5}), "ids that are no list"),
        (pickle.dumps({"data": ARRAY, "ids": [[]] * 12}), "neither whole numbers nor text"),
        (pickle.dumps({"data": ARRAY, "ids": [10**5000] * 12}), "neither whole numbers nor text"),
    ]:
        path.write_bytes(content)
        assert words in refused(path)
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file but a FIFO" in refused(path)


def test_archives_that_do_not_say_which_array(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=ARRAY, b=ARRAY)
    assert "which of its arrays holds the images? a, b" in refused(path)
    np.savez(path, anything=ARRAY, ids=np.arange(12))
    assert torch.equal(whole(open_images(path)), IMAGES)
    torch.save({"data": IMAGES}, path)
    assert "a ZIP archive without arrays" in refused(path)
    np.savez(path, a=np.array([{}]))
    assert "cannot be read as arrays" in refused(path)
    np.savez(path, data=ARRAY)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", b"no array")
    assert "cannot be read as arrays" in refused(path)


def test_folders_that_hold_no_images_of_the_right_kind(tmp_path: Path) -> None:
    assert "holds no image" in refused(tmp_path)
    (tmp_path / "cat").mkdir()
    assert "HINT: it has folders, such as cat" in refused(tmp_path)
    bad = tmp_path / "a.png"
    bad.write_bytes(b"x")
    assert "a.png: is not a readable image" in refused(tmp_path)
    Image.new("RGB", (64, 48)).save(bad)
    assert "a.png: is 64x48 pixels; allowed: 32x32" in refused(tmp_path)
    save_png(tmp_path / "a.bmp", IMAGES[0])
    assert "has the same ID as a.bmp" in refused(tmp_path)
    bad.unlink()
    (tmp_path / "a.bmp").unlink()
    os.mkfifo(bad)
    assert "is no regular file" in refused(tmp_path)
