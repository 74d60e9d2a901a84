"""A user's own images, data.target: taken as they are, called on each start, and one clear error for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_hpc.config import user_code
from cifar_hpc.config.io import changed_keys, from_plain, new_spec
from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.data.sources import with_size
from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.launch.preflight import check_data

HEAD = """
import numpy as np
import torch

def images(count, size=8, layout="planes"):
    planes = np.random.default_rng(count).integers(0, 256, (count, 3, size, size), np.uint8)
    return planes if layout == "planes" else planes.transpose(0, 2, 3, 1)
"""
GOOD = """
def load(size=8, layout="planes"):
    return {
        "train_images": images(6, size, layout), "train_labels": np.arange(6) % 3,
        "test_images": images(3, size, layout), "test_labels": [2, 1, 0],
        "classes": ["a", "b", "c"],
    }
"""


def spec_of(folder: Path, text: str, **data: Any) -> DataSpec:
    """The section data of a job in `folder` whose file mydata.py ends with `text`; its copy is in folder/user_code."""
    (folder / "mydata.py").write_text(HEAD + text)
    values = {"target": "mydata.py:load", "image_size": 8} | data
    spec = new_spec({"data": values}, folder)
    user_code.write(user_code.collect("mydata.py:load", folder, "data.target"), folder / "user_code")
    return spec.data


def load(folder: Path, text: str, **data: Any) -> Dataset:
    return load_dataset(spec_of(folder, text, **data), folder, user_code=folder / "user_code")


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_arrays_of_either_layout_are_taken(tmp_path: Path, layout: str) -> None:
    found, plain = load(tmp_path, GOOD, args={"layout": layout}), load(tmp_path, GOOD)
    assert found.train_images.shape == (6, 3, 8, 8) and found.train_images.is_contiguous()
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1, 2, 0, 1, 2], [2, 1, 0])
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64
    assert (found.info.classes, found.info.image_size) == (("a", "b", "c"), 8)
    assert torch.equal(found.train_images, plain.train_images) and torch.equal(found.test_images, plain.test_images)
    pixels = (found.train_images.double() / 255).transpose(0, 1).flatten(1)
    assert found.info.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)


def test_a_tuple_of_tensors_is_taken_and_keys_of_data_hold(tmp_path: Path) -> None:
    text = """
def load():
    x = torch.from_numpy(images(9))
    return x, torch.arange(9, dtype=torch.uint8) % 2, x[:0], torch.zeros(0, dtype=torch.int32), ("no", "yes")
"""
    found = load(tmp_path, text, train_size=7, holdout=2)
    assert (len(found.train_labels), len(found.test_labels), found.info.classes) == (5, 2, ("no", "yes"))
    with pytest.raises(SpecError, match=r"test_images holds no image\. HINT: data\.holdout=N"):
        load(tmp_path, text)


def test_root_and_image_size_are_passed_to_a_function_that_takes_them(tmp_path: Path) -> None:
    text = GOOD.replace("size, ", "image_size, ").replace("def load(size=8, ", "def load(root, image_size, more, ")
    text = text.replace('["a", "b", "c"]', "[root, str(image_size), more]")
    found = load(tmp_path, text, root="there", args={"more": "x"})
    assert found.info.classes == (str(tmp_path / "there"), "8", "x")
    assert load(tmp_path, text, args={"more": "x", "image_size": 8, "root": "mine"}).info.classes[0] == "mine"


LABELS, IMAGES = '"test_labels": [2, 1, 0]', '"train_images": images(6, size, layout)'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("return {", "return [1] or {", "returns list; allowed: a dictionary, or a tuple in this order, of train_im"),
        ("return {", "return (1, 2) or {", "returns tuple of 2; allowed"),
        ('"classes":', '"names":', "returns a dictionary of train_images, .*, names; allowed"),
        (IMAGES, '"train_images": images(6) / 255', "train_images: is torch.float64; allowed: uint8.*HINT: return"),
        (IMAGES, '"train_images": images(6).astype("int32")', "train_images: is torch.int32; allowed: uint8.*HINT: re"),
        (IMAGES, '"train_images": images(6)[:, 0]', r"train_images: has the shape \[6, 8, 8\]; allowed: \[N, 3"),
        (IMAGES, '"train_images": images(6)[:, :, 1:]', r"train_images: has the shape \[6, 3, 7, 8\]; allowed"),
        (IMAGES, '"train_images": images(6, 9)', r"train_images: 9x9 pixels; data\.image_size says 8\. HINT: data"),
        (IMAGES, '"train_images": [object()]', "train_images: is list; allowed: an array of numpy, or a tensor"),
        (IMAGES, '"train_images": images(5)', r"train_labels: has the shape \[6\]; allowed: \[5\], a label for each"),
        (LABELS, '"test_labels": [2, 1]', r"test_labels: has the shape \[2\]; allowed: \[3\], a label for each"),
        (LABELS, '"test_labels": [2, 1, 3]', "test_labels: from 1 to 3; allowed: 0 to 2, as there are 3 classes"),
        (LABELS, '"test_labels": [2, 1, -1]', "test_labels: from -1 to 2; allowed: 0 to 2"),
        (LABELS, '"test_labels": [2.0, 1, 0]', "test_labels: is torch.float64; allowed: whole numbers"),
        (LABELS, '"test_labels": ["a", "b", "c"]', "test_labels: is list; allowed: an array of numpy, or a tensor"),
        ('["a", "b", "c"]', '["a", "b", "a"]', "classes is .*; allowed: a list of 2 or more names"),
        ('["a", "b", "c"]', "3", "classes is '3'; allowed: a list of 2 or more names"),
        ('["a", "b", "c"]', '["a"]', "classes is .*; allowed: a list of 2 or more names"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_answer_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError, match=rf"^data\.target: mydata\.py:load: {words}") as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [
        ("def load():\n    return 1 / 0\n", {}, r"mydata\.py, line 9: return 1 / 0: ZeroDivisionError: division"),
        ("def load(a):\n    return {}\n", {}, r"TypeError: load\(\) missing 1 required .*: 'a'"),
        ("def load():\n    return {}\n", {"a": 1}, r"TypeError: load\(\) got an unexpected keyword argument 'a'"),
        ("load = 3\n", {}, "TypeError: 3 is not a callable object"),
        ("raise OSError('no disk')\ndef load(): pass\n", {}, r"cannot be loaded: mydata\.py, line 8: .*OSError: no d"),
    ],
)  # fmt: skip
def test_an_error_in_the_users_code_is_shown_with_its_line(
    tmp_path: Path, text: str, args: dict[str, Any], words: str
) -> None:
    with pytest.raises(RunFailedError, match=rf"^data\.target: '?mydata\.py:load'?:? ?{words}"):
        load(tmp_path, text, args=args)


def test_an_installed_package_may_have_the_function(tmp_path: Path) -> None:
    data = from_plain({"data": {"target": "os.path:join"}}).data
    with pytest.raises(RunFailedError, match=r"^data\.target: os\.path:join: TypeError: join\(\) missing 1"):
        load_dataset(data, tmp_path)


def test_a_submission_takes_the_size_from_the_spec_and_knows_no_numbers(tmp_path: Path) -> None:
    spec = from_plain({"data": {"target": "os.path:join", "root": "here"}})
    assert check_data(spec, tmp_path) == (spec.data, None) and with_size(spec.data, tmp_path).size == 32
    assert changed_keys(spec)["data.root"] == "here", "it may choose the images"
    with pytest.raises(SpecError, match=r"^data\.source: folder has no effect with data\.target"):
        from_plain({"data": {"target": "os.path:join", "source": "folder"}})
