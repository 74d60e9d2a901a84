"""CIFAR-10 and CIFAR-100: download with torchvision, verification and reading without it.

torchvision takes as long to import as all of the reading takes, and it imports torch, which the submitting process
never does. `python -m cifar_hpc.data.cifar NAME FOLDER` downloads in a process of its own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.errors import SpecError, UserError
from cifar_hpc.files import NotRegularError, open_regular, read_regular, try_flock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cifar:
    """Files of a data set as torchvision's class `name` keeps them.

    Attributes:
        train, test, meta: md5 sums of the files, by name.
        labels, classes: keys of the labels in a batch, and of the classes' names in the meta file.
    """

    name: str
    words: str
    folder: str
    archive: str
    archive_md5: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    labels: str
    classes: str

    @property
    def files(self) -> dict[str, str]:
        """All files of the folder, and their md5 sums."""
        return self.train | self.test | self.meta

    def complete(self, folder: Path) -> bool:
        """Return whether all files exist below `folder`."""
        return all(os.path.exists(folder / self.folder / name) for name in self.files)  # noqa: PTH110


SIZES = 50_000, 10_000  # of each data set: training and test images
SETS = {
    "cifar10": Cifar(
        "CIFAR10", "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"}, {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        "labels", "label_names",
    ),
    "cifar100": Cifar(
        "CIFAR100", "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
        {"train": "16019d7e3df5f24257cddd939b257f8d"}, {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        {"meta": "7973b15100ade9c7d40fb424638fde48"}, "fine_labels", "fine_label_names",
    ),
}  # fmt: skip


def fetch(cifar: Cifar, folder: Path) -> None:
    """Download a data set into `folder`, unless all its files are there; one process at a time.

    Raises:
        SpecError: it cannot be downloaded.
    """
    if cifar.complete(folder):
        return
    prefix = f".{cifar.name.lower()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_regular(folder / f"{prefix}.lock", os.O_RDWR | os.O_CREAT), "wb") as file:
            alone = try_flock(file.fileno())
            if alone is False:
                words = f"waiting for another process that downloads {cifar.words} into {folder}"
                print(words, file=sys.stdout, flush=True)  # which preflight.check_data shows
                fcntl.flock(file, fcntl.LOCK_EX)
            for left in folder.glob(f"{prefix}-*") if alone is not None else ():  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not cifar.complete(folder):
                _download(cifar, folder, f"{prefix}-")
    except Exception as error:  # urllib, tarfile and torchvision each raise their own
        raise SpecError(
            f"data.root: {folder} holds no {cifar.words} and the download failed: {' '.join(str(error).split())}. "
            f"HINT: put {cifar.archive} (md5 {cifar.archive_md5}) there yourself, or use --set data.source=synthetic, "
            "or data.source=folder with data.root=FOLDER."
        ) from None


def _download(cifar: Cifar, folder: Path, prefix: str) -> None:
    """Unpack the archive beside its place and move the files there, so that none is ever there in part."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    archive = folder / cifar.archive
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        beside = Path(name)
        if there := check_integrity(str(archive), cifar.archive_md5):
            (beside / cifar.archive).symlink_to(archive.absolute())
        getattr(datasets, cifar.name)(name, download=True)
        if not there:
            (beside / cifar.archive).replace(archive)
        (folder / cifar.folder).mkdir(exist_ok=True)
        for path in (beside / cifar.folder).iterdir():
            path.replace(folder / cifar.folder / path.name)


def verify(cifar: Cifar, folder: Path) -> None:
    """Verify a data set in `folder`.

    Raises:
        SpecError: names the file that is missing, truncated or wrong.
    """
    with ThreadPoolExecutor() as pool:  # the checksums are computed in parallel
        list(pool.map(partial(_verified, cifar, folder), cifar.files))


def read(cifar: Cifar, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Training images uint8 [N, 3, 32, 32], their labels int64 [N], the same two for the test, and the classes' names.

    Raises:
        SpecError: as `verify`.
    """
    with ThreadPoolExecutor() as pool:
        meta, *batches = pool.map(partial(_unpickled, cifar, folder), cifar.meta | cifar.train | cifar.test)
    train, test = batches[: len(cifar.train)], batches[len(cifar.train) :]
    return *_joined(cifar, train), *_joined(cifar, test), tuple(meta[cifar.classes])


def _joined(cifar: Cifar, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    import torch

    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    return images.view(-1, 3, 32, 32), torch.tensor([label for batch in batches for label in batch[cifar.labels]])


def _unpickled(cifar: Cifar, folder: Path, name: str) -> dict[str, Any]:
    # Exactly the bytes that are unpickled have been verified, so only the data set's own pickles are executed.
    return pickle.loads(_verified(cifar, folder, name), encoding="latin1")  # type: ignore[no-any-return]


def _verified(cifar: Cifar, folder: Path, name: str) -> bytes:
    path, md5 = folder / cifar.folder / name, cifar.files[name]
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise SpecError(
            f"data.root: {path} is missing. HINT: submit from a machine with internet, or put "
            f"{cifar.archive} into {folder} and unpack it."
        ) from None
    except NotRegularError:
        content = b""  # nor is that the original
    except OSError as error:
        raise SpecError(f"data.root: {path} cannot be read: {error.strerror}.") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise SpecError(
            f"data.root: {path} is truncated or not the original (its md5 should be {md5}). "
            "HINT: if nobody is just writing it, delete it and submit again."
        )
    return content


def main(name: str, folder: str) -> int:
    """Exit status 0 where `folder` holds all files of the data set afterwards."""
    try:
        fetch(SETS[name], Path(folder))
        verify(SETS[name], Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
