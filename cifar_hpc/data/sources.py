"""The registry of sources of images: each with its checks, which the submitting process runs, and its loading.

A new source is a class here and a name in `SOURCES` and in data.source (config/spec.py). torch is imported where images
are loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_hpc.config.spec import DataSpec
from cifar_hpc.data import cifar
from cifar_hpc.data.cifar import Cifar
from cifar_hpc.data.image_folder import class_folders, list_folder, own_size
from cifar_hpc.data.info import CIFAR10, SYNTHETIC, UNKNOWN, DatasetInfo
from cifar_hpc.errors import SpecError
from cifar_hpc.text import counted

if TYPE_CHECKING:
    from cifar_hpc.data.datasets import Dataset

Progress = Callable[[str], bool]
PROJECT = Path(__file__).resolve().parents[2]
SYNTHETIC_SIZES = 10_000, 2_000


class Source:
    """A kind of images. Methods take the section `data`, and the project's root, where a relative data.root starts.

    downloads: `fetch` brings missing images.
    names: of the classes where no checkpoint holds them, as in `class_names`.
    measured: the mean and deviation of the channels are those of its training images, and not CIFAR-10's.
    """

    downloads = measured = False
    names = UNKNOWN

    def fetch(self, data: DataSpec, root: Path) -> None:
        """Download what is missing."""

    def check(self, data: DataSpec, root: Path) -> tuple[int, int] | None:
        """Check the images without decoding them; return their numbers for training and test, if they are known.

        Raises:
            SpecError: names the file or folder that is missing or wrong.
        """
        return None

    def image_size(self, data: DataSpec, root: Path) -> int | None:
        """Height and width of the images where data.image_size does not give one; None for 32."""
        return None

    def load(self, data: DataSpec, root: Path, progress: Progress, user_code: Path | None) -> Dataset:
        """Read all images, or those that the spec chooses."""
        raise NotImplementedError

    def classes(self, data: DataSpec, root: Path) -> tuple[str, ...]:
        """Names of the classes, as `class_names`."""
        return self.names

    def words(self, data: DataSpec, root: Path, kind: str = "") -> str:
        """Describe the images.

        Args:
            kind: test or training: only these, in words that may be published; without it, with their place.
        """
        raise NotImplementedError


class CifarSource(Source):
    """CIFAR-10 or CIFAR-100, as torchvision keeps it in data.root."""

    downloads = True

    def __init__(self, name: str, names: tuple[str, ...], measured: bool) -> None:
        self.name, self.names, self.measured = name, names, measured

    @property
    def cifar(self) -> Cifar:
        """The files of the data set."""
        return cifar.SETS[self.name]

    def fetch(self, data: DataSpec, root: Path) -> None:
        folder = root / data.root
        if self.cifar.complete(folder):
            return
        command = [sys.executable, "-m", "cifar_hpc.data.cifar", self.name, str(folder)]
        # torchvision's download messages go to standard error; standard output is for the answer. A session of its own:
        # Ctrl-C stops training only once it has begun.
        result = subprocess.run(
            command, cwd=PROJECT, stdout=2, stderr=subprocess.PIPE, text=True, check=False, start_new_session=True
        )
        if result.returncode != 0:
            raise SpecError("".join(result.stderr.strip().splitlines()[-1:]) or "data.root: the download failed.")

    def check(self, data: DataSpec, root: Path) -> tuple[int, int] | None:
        cifar.verify(self.cifar, root / data.root)
        return cifar.SIZES

    def load(self, data: DataSpec, root: Path, progress: Progress, user_code: Path | None) -> Dataset:
        from cifar_hpc.data.datasets import Dataset

        train, train_labels, test, test_labels, classes = cifar.read(self.cifar, root / data.root)
        return Dataset(train, train_labels, test, test_labels, info=DatasetInfo(classes))

    def words(self, data: DataSpec, root: Path, kind: str = "") -> str:
        return f"{self.cifar.words}'s {kind} images" if kind else f"{self.cifar.words} in {root / data.root}"


class FolderSource(Source):
    """Image files in a folder of data.root for each class."""

    def check(self, data: DataSpec, root: Path) -> tuple[int, int] | None:
        files, _, _ = list_folder(root / data.root, data.holdout is not None)
        return len(files["train"]), len(files["test"])

    def image_size(self, data: DataSpec, root: Path) -> int | None:
        files, _, _ = list_folder(root / data.root, data.holdout is not None)
        return own_size([*files["train"], *files["test"]])

    def load(self, data: DataSpec, root: Path, progress: Progress, user_code: Path | None) -> Dataset:
        from cifar_hpc.data.datasets import read_folder

        return read_folder(data, root, progress)

    def classes(self, data: DataSpec, root: Path) -> tuple[str, ...]:
        for folder in (root / data.root / "train", root / data.root / "test", root / data.root):
            with contextlib.suppress(SpecError):
                if len(names := class_folders(folder)) > 1:
                    return tuple(names)
        return UNKNOWN

    def words(self, data: DataSpec, root: Path, kind: str = "") -> str:
        split = {"test": "test", "training": "train"}.get(kind)
        return f"{Path(data.root).name}/{split}" if split else str(root / data.root)


class SyntheticSource(Source):
    """Pictures that are drawn."""

    names = SYNTHETIC

    def check(self, data: DataSpec, root: Path) -> tuple[int, int]:
        return data.train_size or SYNTHETIC_SIZES[0], data.test_size or SYNTHETIC_SIZES[1]

    def load(self, data: DataSpec, root: Path, progress: Progress, user_code: Path | None) -> Dataset:
        from cifar_hpc.data.datasets import Dataset
        from cifar_hpc.data.synthetic import make_synthetic

        return Dataset(*make_synthetic(*self.check(data, root)), info=DatasetInfo(SYNTHETIC))

    def words(self, data: DataSpec, root: Path, kind: str = "") -> str:
        return f"the synthetic {kind} images" if kind else "synthetic"


class TargetSource(Source):
    """Images from the user's own function, data.target."""

    measured = True

    def load(self, data: DataSpec, root: Path, progress: Progress, user_code: Path | None) -> Dataset:
        from cifar_hpc.data.target import load_target

        return load_target(data, root, user_code)

    def words(self, data: DataSpec, root: Path, kind: str = "") -> str:
        return f"the {kind} images of {data.target}" if kind else str(data.target)


SOURCES: dict[str, Source] = {
    "cifar10": CifarSource("cifar10", CIFAR10, measured=False),
    "cifar100": CifarSource("cifar100", tuple(f"class {label}" for label in range(100)), measured=True),
    "folder": FolderSource(),
    "synthetic": SyntheticSource(),
}


def source_of(data: DataSpec) -> Source:
    """Source of the images that the section `data` names."""
    return SOURCES[data.source] if data.target is None else TargetSource()


def with_size(data: DataSpec, root: Path) -> DataSpec:
    """`data` with data.image_size filled in where it is the images' own.

    Raises:
        SpecError: names an image that is not square, or of another size than others.
    """
    if data.image_size is not None:
        return data
    return dataclasses.replace(data, image_size=source_of(data).image_size(data, root))


def check_sizes(data: DataSpec, train: int, test: int) -> tuple[int, int]:
    """Numbers of images that the spec chooses out of `train` and `test`.

    Raises:
        SpecError: they are not enough.
    """
    chosen = []
    for key, size, there in (("train_size", data.train_size, train), ("test_size", data.test_size, test)):
        if size is not None and size > there:
            raise SpecError(f"data.{key}: {size} is more than there are: {counted(there, 'image')}.")
        chosen.append(there if size is None else size)
    if data.holdout is not None and data.holdout >= chosen[0]:
        raise SpecError(
            f"data.holdout: {data.holdout} is not allowed; allowed: less than the {chosen[0]} training images."
        )
    return chosen[0], chosen[1]


def class_names(data: DataSpec, root: Path) -> tuple[str, ...]:
    """Names of the classes of a run whose checkpoints do not hold them; "class 0" and so on if they are unknown."""
    return source_of(data).classes(data, root)
