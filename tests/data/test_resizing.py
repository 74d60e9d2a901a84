"""Progressive resizing: its sizes, its pixels against torchvision, and what training and evaluation make of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as V
from helpers import take_steps, tiny_engine, tiny_spec
from torch import Tensor

from cifar_hpc.config.schedule import epochs_left, resizes, training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.mixing import resize
from cifar_hpc.errors import SpecError
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.evaluation import evaluate


def sizes(epochs: int, **keys: Any) -> list[int]:
    spec = tiny_spec(resizing={"initial": 16, **keys}, train={"epochs": epochs})
    return [training_size(spec, epoch) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("epochs", "keys", "expected"),
    [
        (10, {}, [16] * 5 + [20, 24, 28, 32, 32]),
        (10, {"delay": 0.3, "finetune": 0.3}, [16] * 3 + [20, 24, 28, 32] + [32] * 3),
        (10, {"increment": 8}, [16] * 5 + [24, 24, 32, 32, 32]),
        (10, {"delay": 0.8}, [16] * 8 + [32] * 2),
        (10, {"delay": 0, "finetune": 1}, [32] * 10),
        (10, {"delay": 1, "finetune": 0}, [16] * 9 + [32]),
        (3, {}, [16, 24, 32]),
        (1, {}, [32]),
        (4, {"initial": 27, "increment": 4}, [27, 27, 31, 32]),
        (3, {"initial": 32}, [32] * 3),
        (3, {"initial": None}, [32] * 3),
    ],
)
def test_sizes(epochs: int, keys: dict[str, Any], expected: list[int]) -> None:
    assert sizes(epochs, **keys) == expected


@pytest.mark.parametrize(
    ("size", "initial", "increment", "expected"),
    [
        (48, 24, 4, [24] * 5 + [32, 36, 44, 48, 48]),
        (64, 32, 16, [32] * 5 + [48, 48, 64, 64, 64]),
        (96, 48, 1, [48] * 5 + [60, 72, 84, 96, 96]),
        (96, 48, 96, [48] * 5 + [96] * 5),
        (96, 96, 4, [96] * 10),
        (16, 8, 4, [8] * 5 + [12, 12, 16, 16, 16]),
    ],
)
def test_sizes_up_to_that_of_the_data(size: int, initial: int, increment: int, expected: list[int]) -> None:
    resizing = {"initial": initial, "increment": increment}
    spec = tiny_spec(data={"image_size": size}, resizing=resizing, train={"epochs": 10})
    assert [training_size(spec, epoch) for epoch in range(10)] == expected
    assert resizes(spec) == (initial < size)
    assert epochs_left(spec, 0) == sum(one**2 for one in expected) / initial**2


def test_shares_of_the_epochs_are_not_cut_by_floating_point() -> None:
    assert 0.29 * 100 < 29
    assert sizes(100, delay=0.29, finetune=0.71) == [16] * 29 + [32] * 71


def test_the_epochs_left_count_by_their_pixels() -> None:
    spec = tiny_spec(resizing={"initial": 16}, train={"epochs": 4})  # 16, 16, 24, 32
    small, larger, whole = 16**2, 24**2, 32**2
    assert epochs_left(spec, 0) == 2 + (larger + whole) / small
    assert epochs_left(spec, 1.25) == 0.75 + (larger + whole) / small
    assert epochs_left(spec, 2.5) == 0.5 + whole / larger
    assert [epochs_left(spec, done) for done in (3, 3.75, 4, 5)] == [1, 0.25, 0, 0]
    assert epochs_left(tiny_spec(train={"epochs": 4}), 1.5) == 2.5


def images(count: int = 7, whole: int = 32) -> Tensor:
    noise = torch.randn(count, 3, whole, whole, generator=torch.Generator().manual_seed(1))
    return noise.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("whole", "size"),
    [*((32, size) for size in (4, 16, 20, 23, 28)), (48, 24), (48, 44), (64, 32), (64, 40), (96, 48), (96, 92)],
)
def test_pixels_are_torchvisions(whole: int, size: int) -> None:
    expected = V.resize(images(whole=whole).contiguous(), [size, size], antialias=True)
    small = resize(images(whole=whole), size)
    torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-6)
    assert small.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("whole", "size"), [(32, 16), (32, 20), (32, 28), (48, 36), (64, 40), (96, 52)])
def test_an_image_does_not_depend_on_its_batch(whole: int, size: int) -> None:
    alone = torch.cat([resize(images(whole=whole)[n : n + 1], size) for n in range(7)])
    assert torch.equal(resize(images(whole=whole), size), alone)


def test_whole_images_are_left_as_they_are() -> None:
    whole = images()
    assert resize(whole, 32) is whole


def engine_of(spec: Spec) -> Engine:
    """An engine with synthetic images, drawn larger."""
    engine = tiny_engine(spec)
    larger = {
        name: F.interpolate(getattr(engine.data, name), spec.data.size) for name in ("train_images", "test_images")
    }
    engine.data = dataclasses.replace(engine.data, **larger)
    return engine


def seen(engine: Engine, epoch: int) -> torch.Size:
    shapes = []
    hook = engine.model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    engine.step(epoch, 0, 0, torch.arange(32))
    hook.remove()
    assert len(set(shapes)) == 1
    return shapes[0]


@pytest.mark.parametrize(("whole", "expected"), [(32, (16, 16, 24, 32)), (64, (16, 16, 40, 64))])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_training_sees_images_of_the_epochs_size(
    mixing: dict[str, float], whole: int, expected: tuple[int, ...]
) -> None:
    spec = tiny_spec(
        resizing={"initial": 16},
        mixing=mixing,
        train={"epochs": 4},
        data={"image_size": whole},
        augment={"trivial": True},
    )
    engine = engine_of(spec)
    assert [tuple(seen(engine, epoch)[1:]) for epoch in range(4)] == [(3, s, s) for s in expected]


@pytest.mark.parametrize("whole", [32, 48])
def test_evaluation_measures_statistics_of_whole_images_while_trainings_are_smaller(whole: int) -> None:
    lookahead, data = {"enabled": False, "bn_batches": 2}, {"image_size": whole}
    engine = engine_of(tiny_spec(resizing={"initial": 16}, lookahead=lookahead, data=data, train={"epochs": 2}))
    take_steps(engine, 0, 4)
    running = digest(engine.buffers())
    shapes = []
    hook = engine.model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[-1]))
    first, last = (evaluate(engine, epoch, lambda text: False) for epoch in (0, 1))
    hook.remove()
    assert first is not None and last is not None
    assert set(shapes) == {whole}
    assert digest(engine.buffers()) == running == digest(last.buffers)
    assert digest(first.buffers) != running


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"resizing": {"delay": 0.9}}, r"resizing\.delay: 0\.9 and resizing\.finetune: 0\.2 are more than all epochs"),
        (
            {"resizing": {"initial": 33}},
            r"resizing\.initial: 33 is not allowed; allowed: at most 32, by data\.image_size",
        ),
        ({"resizing": {"increment": 33}}, r"resizing\.increment: 33 is not allowed; allowed: at most 32, by"),
        (
            {"resizing": {"initial": 1025}},
            r"resizing\.initial: 1025 is not allowed; allowed: an integer >= 4 and <= 1024",
        ),
        (
            {"data": {"image_size": 48}, "resizing": {"initial": 49}},
            r"resizing\.initial: 49 is not allowed; allowed: at most 48, by data\.image_size \(48\)",
        ),
        (
            {"data": {"image_size": 8}, "augment": {"crop_padding": 8}},
            r"augment\.crop_padding: 8 is not allowed; allowed: at most 7, by data\.image_size \(8\)",
        ),
        (
            {
                "data": {"image_size": 4},
                "augment": {"crop_padding": 3},
                "model": {"width_multiplier": 0.0625, "blocks": [1, 1, 1], "widths": [64] * 3},
            },
            r"model\.widths: 3 layers are not allowed; allowed: at most 2.*4x4 pixels.*HINT: .*data\.image_size",
        ),
        (
            {
                "resizing": {"initial": 4},
                "model": {"width_multiplier": 0.0625, "blocks": [1, 1, 1], "widths": [64] * 3},
            },
            r"model\.widths: 3 layers are not allowed; allowed: at most 2.*4x4 pixels.*HINT: resizing\.initial",
        ),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        tiny_spec(**sections)
