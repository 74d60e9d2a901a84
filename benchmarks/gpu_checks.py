"""Checks that need CUDA: the same bits twice, the same augmentation as on the CPU, no waiting in the training loop."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Report, Steps, differing, figure, state_tensors, wrong
from benchmarks.measure import ROOT, Row
from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data.augment import kernels
from cifar_hpc.data.augment import pipeline as augment
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.randomness import Stream, mix, uniform

STEPS = 12  # two syncs of Lookahead


def same_bits(bench: Bench, report: Report) -> None:
    """Two engines of one spec in one process, and augmentation here and on the CPU."""
    for amp in ("bf16", "fp16"):
        found = []
        for _ in range(2):
            engine = bench.engine(bench.batches[0], train={"amp": amp})
            step = Steps(engine)
            for _ in range(STEPS):
                step()
            found.append(state_tensors(engine))
        what = f"{amp}, deterministic: tensors that differ after {STEPS} steps done twice"
        report.add(wrong(what, differing(*found), f"of {len(found[0])}"))
    report.add(*_augmentation(bench))


def _augmentation(bench: Bench) -> list[Row]:
    samples = torch.arange(2000)
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config, key = AugmentConfig(), mix(0, Stream.AUGMENT, 0, 0)
    draws, there = uniform(key, samples, kernels.DRAWS), uniform(key, samples.to(bench.device), kernels.DRAWS)
    moved, moved_there = (
        _moved(pixels, kernels.sample_parameters(draws.to(pixels.device), config, 32), config).cpu()
        for pixels in (images, images.to(bench.device))
    )
    whole = augment.augment(images, draws, config, DatasetInfo())
    whole_there = augment.augment(images.to(bench.device), draws.to(bench.device), config, DatasetInfo()).cpu()
    furthest = float((whole - whole_there).abs().max())
    exact = int((whole != whole_there).sum())
    return [
        wrong("random numbers that differ from the CPU's", int((draws != there.cpu()).sum())),
        wrong("moved pixels that differ from the CPU's", int((moved != moved_there).sum())),
        figure(
            "augmented pixels, furthest from the CPU's",
            "",
            [furthest],
            "<= 0.00001",
            f"{exact} of {whole.numel()} values differ in some bit",
        ),
    ]


def _moved(images: Tensor, sampled: kernels.Parameters, config: AugmentConfig) -> Tensor:
    plan = kernels.make_plan(sampled, config, images.shape[3], sorted_by_hue=False)
    return kernels.move(images, plan, torch.empty(4, len(images), *images.shape[2:], device=images.device))


def no_syncs(bench: Bench, report: Report) -> None:
    """Count what waits for the device in the training loop's steps. fp16 has to: GradScaler looks for overflows."""
    if not bench.cuda:
        return report.add(text="Waiting for the device: only CUDA can tell.")
    for amp in ("bf16", "fp16"):
        step = Steps(bench.engine(bench.batches[0], train={"amp": amp}))
        for _ in range(STEPS):
            step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(STEPS):
                    step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count = sum("synchronizing" in str(warning.message) for warning in caught)
        what, place = f"{amp}: waits for the device in {STEPS} steps", _first_sync(step) if count else ""
        row = wrong(what, count, place)
        report.add(row if amp == "bf16" else figure(what, "", [count], note=place))
    return None


def _first_sync(step: Steps) -> str:
    """The line of the product that waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/cifar_hpc/" in f.filename]
        return f"first at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def tests(bench: Bench, report: Report) -> None:
    """The project's own tests that need a GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        return report.add(text="pytest is not installed here: the tests that need a GPU were not run.")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu"]
    ended = subprocess.run(
        [*command, "tests/data/test_augment.py", "tests/test_randomness.py"],
        cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    print("\n".join(lines[-60:]))
    report.add(wrong("tests that need a GPU: runs that failed", int(ended.returncode != 0), lines[-1].strip("= ")))
    return None
