"""CIFAR-10: download and verification with torchvision, reading without it.

torchvision takes as long to import as all of the reading takes, and it imports torch, which the submitting process
never does. `python -m cifar_hpc.data.cifar10 FOLDER` downloads in a process of its own."""

import fcntl
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_hpc.errors import SpecError, UserError
from cifar_hpc.files import NotRegularError, open_regular, read_regular, try_flock

FOLDER = "cifar-10-batches-py"
ARCHIVE, ARCHIVE_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
TRAIN_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_MD5 = {"test_batch": "40351d587109b95175f43aff81a1287e"}
META_MD5 = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}


def fetch_cifar10(folder: Path) -> None:
    """Download CIFAR-10 into `folder`, unless all its files are there; one process at a time.

    Raises:
        SpecError: it cannot be downloaded.
    """
    if _complete(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_regular(folder / ".cifar10.lock", os.O_RDWR | os.O_CREAT), "wb") as file:
            alone = try_flock(file.fileno())
            if alone is False:
                words = f"waiting for another process that downloads CIFAR-10 into {folder}"
                print(words, file=sys.stdout, flush=True)  # which preflight.check_data shows
                fcntl.flock(file, fcntl.LOCK_EX)
            for left in folder.glob(".cifar10-*") if alone is not None else ():  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not _complete(folder):
                _download(folder)
    except Exception as error:  # urllib, tarfile and torchvision each raise their own
        raise SpecError(
            f"data.root: {folder} holds no CIFAR-10 and the download failed: {' '.join(str(error).split())}. "
            f"HINT: put {ARCHIVE} (md5 {ARCHIVE_MD5}) there yourself, or use --set data.source=synthetic, or "
            "data.source=folder with data.root=FOLDER."
        ) from None


def _complete(folder: Path) -> bool:
    return all(os.path.exists(folder / FOLDER / name) for name in TRAIN_MD5 | TEST_MD5 | META_MD5)  # noqa: PTH110


def _download(folder: Path) -> None:
    """Unpack the archive beside its place and move the files there, so that none is ever there in part."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive = folder / ARCHIVE
    with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder) as name:
        beside = Path(name)
        if there := check_integrity(str(archive), ARCHIVE_MD5):
            (beside / ARCHIVE).symlink_to(archive.absolute())
        CIFAR10(name, download=True)
        if not there:
            (beside / ARCHIVE).replace(archive)
        (folder / FOLDER).mkdir(exist_ok=True)
        for path in (beside / FOLDER).iterdir():
            path.replace(folder / FOLDER / path.name)


def check_cifar10(folder: Path) -> None:
    """Verify CIFAR-10 in `folder`.

    Raises:
        SpecError: names the file that is missing, truncated or wrong.
    """
    for name, md5 in (TRAIN_MD5 | TEST_MD5 | META_MD5).items():
        _verified(folder, name, md5)


def read_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [50000, 3, 32, 32], their labels int64 [50000], and the same two for the test.

    Raises:
        SpecError: as `check_cifar10`.
    """
    for name, md5 in META_MD5.items():
        _verified(folder, name, md5)  # as torchvision does, though nothing of it is needed
    with ThreadPoolExecutor() as pool:  # the checksums are computed in parallel
        train = list(pool.map(partial(_read_batch, folder), TRAIN_MD5, TRAIN_MD5.values()))
        test = list(pool.map(partial(_read_batch, folder), TEST_MD5, TEST_MD5.values()))
    return *_joined(train), *_joined(test)


def _joined(batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    return images.view(-1, 3, 32, 32), torch.tensor([label for batch in batches for label in batch["labels"]])


def _read_batch(folder: Path, name: str, md5: str) -> dict[str, Any]:
    # Exactly the bytes that are unpickled have been verified, so only CIFAR-10's own pickles are executed.
    return pickle.loads(_verified(folder, name, md5), encoding="latin1")  # type: ignore[no-any-return]


def _verified(folder: Path, name: str, md5: str) -> bytes:
    path = folder / FOLDER / name
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise SpecError(
            f"data.root: {path} is missing. HINT: submit from a machine with internet, or put "
            f"{ARCHIVE} into {folder} and unpack it."
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


def main(folder: str) -> int:
    """Exit status 0 where `folder` holds a complete CIFAR-10 afterwards."""
    try:
        fetch_cifar10(Path(folder))
        check_cifar10(Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
