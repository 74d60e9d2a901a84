"""CIFAR-10 is downloaded once, whoever asks for it at the same time, and no file of it is ever there in part."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ANSWER_SECONDS, PROJECT, TESTS
from torchvision.datasets import CIFAR10

from cifar_hpc.data import cifar10

NAMES = [*cifar10.TRAIN_MD5, *cifar10.TEST_MD5, *cifar10.META_MD5]
# Runs `python -m cifar_hpc.data.cifar10 FOLDER` for another archive than the original.
DOWNLOAD = """
import json, sys
from cifar_hpc.data import cifar10
from test_download import take_for_the_original
take_for_the_original(setattr, *json.loads(sys.argv[2]))
sys.exit(cifar10.main(sys.argv[1]))
"""


def take_for_the_original(set_: Callable[..., None], sums: dict[str, str], archive_md5: str, url: str) -> None:
    """Make cifar_hpc and torchvision take another archive for CIFAR-10's."""
    for group in ("TRAIN_MD5", "TEST_MD5", "META_MD5"):
        set_(cifar10, group, {name: sums[name] for name in getattr(cifar10, group)})
    set_(cifar10, "ARCHIVE_MD5", archive_md5)
    for key, value in {
        "train_list": [[name, sums[name]] for name, _ in CIFAR10.train_list],
        "test_list": [[name, sums[name]] for name, _ in CIFAR10.test_list],
        "meta": {**CIFAR10.meta, "md5": sums["batches.meta"]},
        "tgz_md5": archive_md5,
        "url": url,
    }.items():
        set_(CIFAR10, key, value)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Mirror:
    """A server of an archive of tiny batches, which holds back the second half of each answer until it may go on."""

    def __init__(self, folder: Path) -> None:
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
        contents = {name: pickle.dumps({**batch, "label_names": [name]}) for name in NAMES}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        self.archive, self.folder, self.asked = buffer.getvalue(), folder, 0
        self.sums = {name: md5(content) for name, content in contents.items()}
        self.half_sent, self.go_on = threading.Semaphore(0), threading.Event()
        self.processes: list[subprocess.Popen[str]] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(mirror.archive)))
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                if self.headers["Method"] == "HEAD":  # torchvision looks for redirections
                    return
                mirror.asked += 1
                half = len(mirror.archive) // 2
                self.wfile.write(mirror.archive[:half])
                self.wfile.flush()
                mirror.half_sent.release()
                assert mirror.go_on.wait(ANSWER_SECONDS)
                self.wfile.write(mirror.archive[half:])

            def log_message(self, *_: Any) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that were killed
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def original(self) -> tuple[dict[str, str], str, str]:
        """Return what `take_for_the_original` takes."""
        return self.sums, md5(self.archive), f"http://127.0.0.1:{self.server.server_port}/{cifar10.ARCHIVE}"

    def start(self) -> subprocess.Popen[str]:
        """Start a process that downloads."""
        environment = os.environ | {"no_proxy": "127.0.0.1", "PYTHONPATH": f"{PROJECT}:{TESTS}:{TESTS / 'data'}"}
        process = subprocess.Popen(
            [sys.executable, "-c", DOWNLOAD, str(self.folder), json.dumps(self.original())],
            cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def shown(self) -> list[str]:
        """What others see of it, in the folder and in that of the batches."""
        found = [*self.folder.iterdir(), *(self.folder / cifar10.FOLDER).glob("*")]
        return sorted(path.name for path in found if not path.name.startswith("."))

    def is_whole(self) -> bool:
        batches = {path.name: md5(path.read_bytes()) for path in (self.folder / cifar10.FOLDER).iterdir()}
        archive = (self.folder / cifar10.ARCHIVE).read_bytes()
        return batches == self.sums and archive == self.archive and not list(self.folder.glob(".cifar10-*"))


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    found = Mirror(tmp_path / "data")
    yield found
    found.go_on.set()
    for process in found.processes:
        with process:
            process.kill()
    found.server.shutdown()
    found.server.server_close()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, errors = process.communicate(timeout=ANSWER_SECONDS)
    return process.returncode, out + errors


def says_that_it_waits(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline().startswith("waiting for another process that downloads CIFAR-10 into ")


@pytest.mark.process
def test_the_second_waits_for_the_first(mirror: Mirror) -> None:
    first = mirror.start()
    assert mirror.half_sent.acquire(timeout=ANSWER_SECONDS)
    second = mirror.start()
    assert says_that_it_waits(second)
    assert mirror.shown() == [], "neither half an archive nor half a batch"
    mirror.go_on.set()
    assert [end(process)[0] for process in (first, second)] == [0, 0]
    assert mirror.asked == 1 and mirror.is_whole()


@pytest.mark.process
def test_the_second_takes_over_from_one_that_is_killed(mirror: Mirror) -> None:
    first = mirror.start()
    assert mirror.half_sent.acquire(timeout=ANSWER_SECONDS)
    second = mirror.start()
    assert says_that_it_waits(second)
    assert len(list(mirror.folder.glob(".cifar10-*"))) == 1
    first.kill()
    end(first)
    assert mirror.half_sent.acquire(timeout=ANSWER_SECONDS), "it asks, too"
    mirror.go_on.set()
    status, words = end(second)
    assert status == 0, words
    assert mirror.asked == 2 and mirror.is_whole()


@pytest.fixture
def here(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """The same for downloads in this process."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    take_for_the_original(monkeypatch.setattr, *mirror.original())
    mirror.folder.mkdir()
    mirror.go_on.set()
    return mirror


def test_an_archive_that_somebody_has_put_there_is_unpacked(here: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    """As the hint of a failed download says; also after a file was deleted, as the hint for a damaged one says."""
    archive = here.folder / cifar10.ARCHIVE
    archive.write_bytes(here.archive)
    inode = archive.stat().st_ino
    assert cifar10.main(str(here.folder)) == 0 and here.is_whole()
    damaged = here.folder / cifar10.FOLDER / "data_batch_3"
    damaged.write_bytes(b"damaged")
    assert cifar10.main(str(here.folder)) == 2
    words = capsys.readouterr().err
    assert f"{damaged} is truncated" in words and "HINT: if nobody is just writing it, delete it" in words
    damaged.unlink()
    assert cifar10.main(str(here.folder)) == 0 and here.is_whole()
    assert here.asked == 0 and archive.stat().st_ino == inode and not archive.is_symlink()


def test_a_damaged_archive_is_replaced(here: Mirror) -> None:
    (here.folder / cifar10.ARCHIVE).write_bytes(here.archive[:100])
    assert cifar10.main(str(here.folder)) == 0
    assert here.asked == 1 and here.is_whole()


def test_what_a_failed_download_leaves(here: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing: neither half an archive nor a folder of temporary files."""
    here.server.shutdown()
    here.server.server_close()
    assert cifar10.main(str(here.folder)) == 2
    assert "download failed" in capsys.readouterr().err
    assert [path.name for path in here.folder.iterdir()] == [".cifar10.lock"]


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cifar10-of-another").mkdir()
    monkeypatch.setattr(cifar10, "try_flock", lambda *_: None)
    downloads = []
    monkeypatch.setattr(cifar10, "_download", downloads.append)
    cifar10.fetch_cifar10(tmp_path)
    assert downloads == [tmp_path] and (tmp_path / ".cifar10-of-another").is_dir()
