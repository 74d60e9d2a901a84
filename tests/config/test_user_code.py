"""The files of a user's own network: which are found, which names are refused, and how errors in them read."""

import os
from pathlib import Path

import pytest

from cifar_hpc.config import user_code
from cifar_hpc.errors import RunFailedError, SpecError

KEY = "model.target"


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _load(folder: Path, target: str) -> object:
    files = user_code.collect(target, folder, KEY)
    user_code.write(files, folder / "copies")
    return user_code.load(target, user_code.digest_of(files), folder / "copies", KEY)


PACKAGE = {
    "nets/__init__.py": "",
    "nets/layers.py": "from .deep import width\n",
    "nets/deep/__init__.py": "from helper import width\n",
    "nets/convnext.py": "import argparse\nfrom .layers import width\ndef make(): return width\n",
    "helper.py": "width = 7\n",
    "stranger.py": "never imported\n",
}


@pytest.mark.parametrize(
    "spelling", ["nets/convnext.py:make", "./nets/convnext.py:make", "../job dir/nets/convnext.py:make"]
)
def test_a_package_is_found_with_what_it_imports(tmp_path: Path, spelling: str) -> None:
    folder = tmp_path / "job dir"
    _write(folder, PACKAGE)
    assert set(user_code.collect(spelling, folder, KEY)) == {*PACKAGE} - {"stranger.py"}
    assert _load(folder, spelling)() == 7  # type: ignore[operator]


def test_an_absolute_path_and_a_link_to_a_file(tmp_path: Path) -> None:
    _write(tmp_path, {"elsewhere/far.py": "def make(): return 3\n", "job/unused.txt": ""})
    (tmp_path / "job/linked_net.py").symlink_to(tmp_path / "elsewhere/far.py")
    for target in (f"{tmp_path}/elsewhere/far.py:make", "linked_net.py:make"):
        assert _load(tmp_path / "job", target)() == 3  # type: ignore[operator]


@pytest.mark.parametrize(
    "name", ["typing.py", "queue.py", "torch.py", "cifar_hpc.py", "sub/numpy.py", "my.net.py", "site/__init__.py"]
)
def test_names_that_would_import_another_module_are_refused_at_submission(tmp_path: Path, name: str) -> None:
    _write(tmp_path, {name: "def make(): return 3\n"})
    with pytest.raises(
        SpecError, match=rf"^model.target: {tmp_path / name} is not allowed; allowed: .*HINT: rename it"
    ):
        user_code.collect(f"{name}:make", tmp_path, KEY)


def test_a_sibling_of_such_a_name_is_refused_and_one_in_a_package_is_not(tmp_path: Path) -> None:
    _write(tmp_path, {"net1.py": "import random\n\ndef make(): ...\n", "random.py": ""})
    with pytest.raises(SpecError, match=r"random\.py is not allowed"):
        user_code.collect("net1.py:make", tmp_path, KEY)
    _write(
        tmp_path, {"zoo/__init__.py": "", "zoo/net2.py": "from .types import make\n", "zoo/types.py": "make = int\n"}
    )
    assert _load(tmp_path, "zoo/net2.py:make") is int


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bad1.py": "def make(:\n"}, r"bad1\.py, line 1: is no Python"),
        ({"bad1.py": "from other1 import make\n", "other1.py": "x = 1\ny = (\n"}, r"other1\.py, line 2: is no Python"),
        ({"bad1.py": "def mak(): ...\nclass Net: ...\n"}, "defines no make; it defines: mak, Net"),
        ({}, "cannot be read: No such file"),
    ],
)
def test_errors_that_the_submission_sees(tmp_path: Path, files: dict[str, str], message: str) -> None:
    _write(tmp_path, files)
    with pytest.raises(SpecError, match=message):
        user_code.collect("bad1.py:make", tmp_path, KEY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import no_such_package.layers",
            "line 1: import no_such.*ModuleNotFoundError: No module.*HINT: .* installed for",
        ),
        ("from .layers import make", r"line 1: from \.layers.*ImportError: attempted relative.*HINT: .*__init__\.py"),
        ("import sys; sys.exit(2)", r"line 1: import sys; sys\.exit\(2\): SystemExit: 2$"),
        ("assert 1 > 2", "line 1: assert 1 > 2: AssertionError$"),
    ],
)
def test_errors_of_importing_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    name = "failing.py"  # the copies lie in folders of their own
    _write(tmp_path, {name: f"{text}\nmake = 1\n"})
    with pytest.raises(RunFailedError, match=rf"^model.target: .* cannot be loaded: {name}, {message}"):
        _load(tmp_path, f"{name}:make")


def test_files_of_two_runs_may_have_the_same_names(tmp_path: Path) -> None:
    text = "from twin_utils import width\ndef make(): return width\n"
    for folder, width in (("one", 1), ("two", 2), ("one", 1)):
        _write(tmp_path / folder, {"twin.py": text, "twin_utils.py": f"width = {width}\n"})
        assert _load(tmp_path / folder, "twin.py:make")() == width  # type: ignore[operator]


def test_copies_that_are_missing_or_modified_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"copied.py": "def make(): return 3\n"})
    files = user_code.collect("copied.py:make", tmp_path, KEY)
    copies, code = tmp_path / "copies", user_code.digest_of(files)
    with pytest.raises(SpecError, match="is missing"):
        user_code.load("copied.py:make", code, copies, KEY)
    user_code.write(files, copies)
    (copies / code / "copied.py").write_text("def make(): return 4\n")
    with pytest.raises(SpecError, match="has been modified"):
        user_code.load("copied.py:make", code, copies, KEY)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(SpecError, match=r"pipe\.py cannot be read: "):
        user_code.collect("pipe.py:make", tmp_path, KEY)
