"""The six augmentations on one CPU core, against torchvision's transforms, and their share of a training step.

Ours takes a batch of 128, draws included; torchvision takes the same images one by one, as a Dataset does, and stacks
them. Each has one thread. The share is that of augmentation with all cores in a step of the full model with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.measure import Row, alternate, meets, quartiles, ratios, run_part
from benchmarks.peers.data import TRAIN_TRANSFORM
from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data.augment.kernels import DRAWS
from cifar_hpc.data.augment.pipeline import augment
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.data.info import CIFAR10_MEAN, CIFAR10_STD, DatasetInfo
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.randomness import Stream, mix, uniform
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, resolve_amp

BATCH = 128
STEP_THREADS = 2
PIL_TARGET = ">= 20"
SHARE_TARGET = "<= 3 %"
OURS, PIL, V2 = "ours", "torchvision's transforms, PIL images", "torchvision's transforms v2, uint8 tensors"


def measure(quick: bool) -> list[Row]:
    """Rows of the part "augmentation"."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        engine = _engine()
        share = _share(engine, 1 if quick else 8)
        torch.set_num_threads(1)
        return [*_speeds(engine, 3 if quick else 15), share]
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _engine() -> Engine:
    spec = from_plain({"train": {"batch_size": BATCH, "shards": 1, "cpu_threads": STEP_THREADS, "device": "cpu"}})
    device = torch.device("cpu")
    configure_torch(spec, device)
    data = Dataset(*make_synthetic(BATCH, 16))
    return Engine(spec, device, ShardLayout(1, 1, 0), data, resolve_amp(spec, device))


def _share(engine: Engine, repetitions: int) -> Row:
    rows = torch.arange(BATCH)
    seconds = alternate(
        {"step": lambda: engine.step(0, 0, 0, rows), OURS: lambda: engine.augmented(rows, 1)}, repetitions
    )
    shares = [100 * ours / step for ours, step in zip(seconds[OURS], seconds["step"], strict=True)]
    found = quartiles(shares)
    note = f"of a step of {quartiles(seconds['step'])[1]:.3g} s, {engine.amp}"
    what = f"augmentation in a step, batch {BATCH}, {STEP_THREADS} threads"
    return Row("augmentation", what, "%", found, target=SHARE_TARGET, met=meets(found[1], SHARE_TARGET), note=note)


def _speeds(engine: Engine, repetitions: int) -> list[Row]:
    images = engine.data.train_images
    seconds = alternate(_works(images), repetitions, warm_up=2)
    speeds = {name: [BATCH / s for s in times] for name, times in seconds.items()}
    rows = []
    for peer, target in ((PIL, PIL_TARGET), (V2, "")):
        ratio = ratios(speeds[OURS], speeds[peer])
        met = meets(ratio[1], target) if target else None
        ours, theirs = quartiles(speeds[OURS]), quartiles(speeds[peer])
        what = f"augmentation, batch {BATCH}, 1 thread"
        rows.append(Row("augmentation", what, "img/s", ours, peer, theirs, ratio, target, met))
    return rows


def _works(images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Makes one float32 batch, from what the users of each have: torchvision's CIFAR10 keeps arrays, too."""
    samples = torch.arange(len(images))
    key, config = mix(0, Stream.AUGMENT), AugmentConfig()
    pictures = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    tensors = _v2()
    return {
        OURS: lambda: augment(images, uniform(key, samples, DRAWS), config, DatasetInfo()),
        PIL: lambda: torch.stack([TRAIN_TRANSFORM(Image.fromarray(picture)) for picture in pictures]),
        V2: lambda: torch.stack([tensors(image) for image in images]),
    }


def _v2() -> Callable[..., Tensor]:
    return v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CIFAR10_MEAN, CIFAR10_STD),
            v2.RandomErasing(p=0.5),
        ]
    )


if __name__ == "__main__":
    run_part(measure, __doc__)
