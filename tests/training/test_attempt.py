"""One start of a run, in processes of its own: what it finds, and what it refuses to go on with."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import PROJECT, Ranks, tiny_spec
from PIL import Image
from processes import command

from cifar_hpc.data.synthetic import CLASSES, make_synthetic
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import environment
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.checkpoints.store import newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.process import Launch, StopFlag

SET = (
    "model.width_multiplier=0.0625 model.blocks=[1,1,1] train.batch_size=10 train.device=cpu train.amp=fp32 "
    "train.cpu_threads=1 data.source=folder lookahead.bn_batches=1 resources.gpus_per_node=0"
).split()


def draw_folder(folder: Path, seed: int) -> None:
    train, train_labels, test, test_labels = make_synthetic(40, 20, seed)
    for split, images, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / split / CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def train(root: Path, images: str, epochs: int, *more: str) -> tuple[int, str]:
    """Its exit status and its output."""
    keys = [*SET, f"data.root={root / images}", f"train.epochs={epochs}", *more]
    return command(root, "train", str(PROJECT / "jobs" / "improved_resnet.yaml"), "--name", "run", "--set", *keys)


@pytest.mark.process
def test_images_that_moved_are_fine_and_other_images_are_refused(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", seed=1)
    draw_folder(tmp_path / "others", seed=2)
    status, output = train(tmp_path, "images", epochs=1)
    assert status == 0, output
    (tmp_path / "images").rename(tmp_path / "moved")

    status, output = train(tmp_path, "others", epochs=2)
    assert status == 1
    assert f"the training images in {tmp_path / 'others'} are not those that run run was started with" in output
    assert "Traceback" not in output

    status, output = train(tmp_path, "moved", epochs=2)
    assert status == 0, output
    rows = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]


@pytest.mark.process
def test_other_test_images_are_refused(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", seed=1)
    draw_folder(tmp_path / "others", seed=2)
    assert train(tmp_path, "images", epochs=1)[0] == 0
    shutil.rmtree(tmp_path / "images" / "test")
    shutil.copytree(tmp_path / "others" / "test", tmp_path / "images" / "test")

    status, output = train(tmp_path, "images", epochs=2)
    assert status == 1
    assert f"data.root: the test images in {tmp_path / 'images'} are not those that run run was started with" in output


@pytest.mark.process
def test_kernels_that_are_chosen_otherwise_at_a_resume_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATen's and oneDNN's kernels, as on another generation of processors."""
    draw_folder(tmp_path / "images", seed=1)
    for epochs, variables in ((1, {}), (2, {}), (3, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"})):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        status, output = train(tmp_path, "images", epochs)
        assert status == 0, output
    _, same, other = (
        event["environment_changed"]
        for event in read_jsonl(tmp_path / "logs" / "run" / "events.jsonl")
        if event["event"] in ("started", "resumed")
    )
    assert same == {}
    assert other["variables"] == ["", "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"]
    assert "gradient" in other and other.keys() <= {"device", "variables", "gradient"}
    log = (tmp_path / "logs" / "run" / "train.log").read_text()
    assert log.count("this is not the environment of the checkpoint, so the bits differ from here: ") == 1


# ------------------------------------------------------------------------------------------- ranks that differ


def attempt(rank: int, world: int, root: str, sections: list[dict[str, Any]], faults: list[str]) -> int:
    """The exit status of an attempt in which each rank has its own spec, fault and disk: its current folder."""
    place, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(Path(root) / str(rank))
    fault: Any = contextlib.nullcontext()
    if faults[rank] == "torch":
        fault = patch.object(torch, "__version__", "2.11.0")
    elif faults[rank] == "processor":
        fault = patch.object(environment, "processor_name", lambda: "Another CPU")
    elif faults[rank] == "kernels":
        fault = torch.backends.mkldnn.flags(enabled=False)
    with fault:
        launch = Launch(rank, world, rank, None, None, Path(root) / "rendezvous" / "now.json")
        attempt = Attempt(Context(RunPaths(Path(root), "run"), tiny_spec(**sections[rank]), launch, StopFlag()))
        status = attempt.run()
    attempt.context.lock.release()
    del attempt
    gc.collect()
    os.chdir(place)
    torch.set_num_threads(threads)
    return status


HOST = socket.gethostname()
# Each rank sees other images there, as on disks of the nodes.
DISK = {"data": {"source": "folder", "root": "/proc/self/cwd/images", "train_size": None, "test_size": None}}


@pytest.mark.parametrize(
    ("common", "own", "fault", "reason"),
    [
        ({}, {"train": {"epochs": 3}}, "", f"train.epochs: 2 on rank 0 ({HOST}), 3 on rank 1 ({HOST})"),
        ({}, {"train": {"shards": 2}}, "", f"train.shards: 4 on rank 0 ({HOST}), 2 on rank 1 ({HOST})"),
        ({}, {"train": {"amp": "bf16"}}, "", f"train.amp: fp32 on rank 0 ({HOST}), bf16 on rank 1 ({HOST})"),
        ({}, {"train": {"cpu_threads": 2}}, "", f"train.cpu_threads: 1 on rank 0 ({HOST}), 2 on rank 1 ({HOST})"),
        ({}, {}, "torch", f"2.11.0 on rank 1 ({HOST})"),
        (DISK, {}, "train", "training images (data.root or data.target): "),
        (DISK, {}, "test", "test images (data.root or data.target): "),
        ({}, {}, "kernels", "gradient: "),
    ],
    ids=["epochs", "shards", "precision", "threads", "torch", "training images", "test images", "kernels"],
)
def test_ranks_that_would_compute_something_else_are_refused_by_name(
    ranks: Ranks, tmp_path: Path, common: dict[str, Any], own: dict[str, Any], fault: str, reason: str
) -> None:
    (tmp_path / "rendezvous").mkdir()
    for rank in (0, 1):
        draw_folder(tmp_path / str(rank) / "images", seed=1)
    if fault in ("train", "test"):
        shutil.rmtree(tmp_path / "1" / "images" / fault)
        draw_folder(tmp_path / "2", seed=2)
        (tmp_path / "2" / fault).rename(tmp_path / "1" / "images" / fault)
    statuses = ranks.run(2, attempt, str(tmp_path), [common, common | own], ["", fault], group=False)
    log = (tmp_path / "logs" / "run" / "train.log").read_text()
    assert statuses == [1, 1], log
    events = read_jsonl(tmp_path / "logs" / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["failed"]
    for text in (log, events[0]["error"]):
        assert "the ranks do not agree. " in text and reason in text
        assert f"on rank 0 ({HOST}), " in text and f"on rank 1 ({HOST})" in text
    assert log.count("the ranks do not agree") == 1 and "Traceback" not in log


def test_what_ranks_may_differ_in_is_recorded_and_said(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "rendezvous").mkdir()
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    sections = [{"train": {"epochs": 1}}] * 2
    assert ranks.run(2, attempt, str(tmp_path), sections, ["", "processor"], group=False) == [0, 0]
    log = (tmp_path / "logs" / "run" / "train.log").read_text()
    assert "the ranks differ, though their first gradients have the same bits. processor: " in log
    assert f"Another CPU on rank 1 ({HOST})" in log
    (started,) = [e for e in read_jsonl(tmp_path / "logs" / "run" / "events.jsonl") if e["event"] == "started"]
    assert started["hosts"] == [HOST, HOST]
    found = newest_good(tmp_path / "checkpoints" / "run")
    assert found is not None and found.state.environment == started["environment"]
    assert "Another CPU" in started["environment"]["processor"].split(" | ")
    assert started["environment"].keys() >= {"gradient", "data", "test_data", "instructions", "variables"}
