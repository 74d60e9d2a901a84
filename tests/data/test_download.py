"""CIFAR is downloaded once, whoever asks for it at the same time, and no file of it is ever there in part."""

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
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ANSWER_SECONDS, PROJECT, TESTS
from torchvision import datasets

from cifar_hpc.data import cifar

# Runs `python -m cifar_hpc.data.cifar NAME FOLDER` for another archive than the original.
DOWNLOAD = """
import json, sys
from cifar_hpc.data import cifar
from test_download import take_for_the_original
take_for_the_original(setattr, sys.argv[1], *json.loads(sys.argv[3]))
sys.exit(cifar.main(*sys.argv[1:3]))
"""


def take_for_the_original(
    set_: Callable[..., None], name: str, sums: dict[str, str], archive_md5: str, url: str
) -> None:
    """Make cifar_hpc and torchvision take another archive for that of CIFAR-10 or CIFAR-100."""
    ours, theirs = cifar.SETS[name], getattr(datasets, cifar.SETS[name].name)
    groups = {group: {file: sums[file] for file in getattr(ours, group)} for group in ("train", "test", "meta")}
    set_(cifar, "SETS", {**cifar.SETS, name: replace(ours, archive_md5=archive_md5, **groups)})
    for key, value in {
        "train_list": [[file, sums[file]] for file, _ in theirs.train_list],
        "test_list": [[file, sums[file]] for file, _ in theirs.test_list],
        "meta": {**theirs.meta, "md5": sums[theirs.meta["filename"]]},
        "tgz_md5": archive_md5,
        "url": url,
    }.items():
        set_(theirs, key, value)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Mirror:
    """A server of an archive of tiny batches, which holds back the second half of each answer until it may go on."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.cifar = name, cifar.SETS[name]
        batch = {"data": np.zeros((2, 3072), np.uint8), self.cifar.labels: [0, 1]}
        contents = {name: pickle.dumps({**batch, self.cifar.classes: [name, "b"]}) for name in self.cifar.files}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{self.cifar.folder}/{name}")
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
        return self.sums, md5(self.archive), f"http://127.0.0.1:{self.server.server_port}/{self.cifar.archive}"

    def start(self) -> subprocess.Popen[str]:
        """Start a process that downloads."""
        environment = os.environ | {"no_proxy": "127.0.0.1", "PYTHONPATH": f"{PROJECT}:{TESTS}:{TESTS / 'data'}"}
        process = subprocess.Popen(
            [sys.executable, "-c", DOWNLOAD, self.name, str(self.folder), json.dumps(self.original())],
            cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def shown(self) -> list[str]:
        """What others see of it, in the folder and in that of the batches."""
        found = [*self.folder.iterdir(), *(self.folder / self.cifar.folder).glob("*")]
        return sorted(path.name for path in found if not path.name.startswith("."))

    def is_whole(self) -> bool:
        batches = {path.name: md5(path.read_bytes()) for path in (self.folder / self.cifar.folder).iterdir()}
        archive = (self.folder / self.cifar.archive).read_bytes()
        return batches == self.sums and archive == self.archive and not list(self.folder.glob(f".{self.name}-*"))


@pytest.fixture(params=["cifar10"])
def mirror(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mirror]:
    found = Mirror(tmp_path / "data", request.param)
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
    take_for_the_original(monkeypatch.setattr, mirror.name, *mirror.original())
    mirror.folder.mkdir()
    mirror.go_on.set()
    return mirror


def test_an_archive_that_somebody_has_put_there_is_unpacked(here: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    """As the hint of a failed download says; also after a file was deleted, as the hint for a damaged one says."""
    archive = here.folder / here.cifar.archive
    archive.write_bytes(here.archive)
    inode = archive.stat().st_ino
    assert cifar.main(here.name, str(here.folder)) == 0 and here.is_whole()
    damaged = here.folder / here.cifar.folder / "data_batch_3"
    damaged.write_bytes(b"damaged")
    assert cifar.main(here.name, str(here.folder)) == 2
    words = capsys.readouterr().err
    assert f"{damaged} is truncated" in words and "HINT: if nobody is just writing it, delete it" in words
    damaged.unlink()
    assert cifar.main(here.name, str(here.folder)) == 0 and here.is_whole()
    assert here.asked == 0 and archive.stat().st_ino == inode and not archive.is_symlink()


@pytest.mark.parametrize("mirror", ["cifar10", "cifar100"], indirect=True)
def test_a_damaged_archive_is_replaced(here: Mirror) -> None:
    (here.folder / here.cifar.archive).write_bytes(here.archive[:100])
    assert cifar.main(here.name, str(here.folder)) == 0
    assert here.asked == 1 and here.is_whole()


@pytest.mark.parametrize("mirror", ["cifar10", "cifar100"], indirect=True)
def test_what_a_failed_download_leaves(here: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing: neither half an archive nor a folder of temporary files."""
    here.server.shutdown()
    here.server.server_close()
    assert cifar.main(here.name, str(here.folder)) == 2
    assert f"holds no {here.cifar.words} and the download failed" in capsys.readouterr().err
    assert [path.name for path in here.folder.iterdir()] == [f".{here.name}.lock"]


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cifar10-of-another").mkdir()
    monkeypatch.setattr(cifar, "try_flock", lambda *_: None)
    downloads = []
    monkeypatch.setattr(cifar, "_download", lambda _, folder, prefix: downloads.append(folder))
    cifar.fetch(cifar.SETS["cifar10"], tmp_path)
    assert downloads == [tmp_path] and (tmp_path / ".cifar10-of-another").is_dir()
