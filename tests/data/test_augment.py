"""Augmentation against torchvision, and the distributions of its parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torchvision.transforms.functional as F
from helpers import no_waiting
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import ColorJitter, InterpolationMode, RandomErasing

from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data.augment import kernels
from cifar_hpc.data.augment import pipeline as A
from cifar_hpc.data.augment.kernels import blends_before_hue
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import SpecError
from cifar_hpc.randomness import Stream, mix, uniform

CONFIG = AugmentConfig()
INFO = DatasetInfo()
OTHER_SIZES = [48, 64, 96]
OFF = AugmentConfig(crop_padding=0, flip=0, rotation=0, brightness=0, contrast=0, saturation=0, hue=0, erasing=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on many threads crawl when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draws_for(count: int, seed: int = 0) -> Tensor:
    return uniform(mix(seed, Stream.AUGMENT), torch.arange(count), kernels.DRAWS)


def random_images(count: int, seed: int = 0, size: int = 32) -> Tensor:
    """Noise in one half, and in the other smooth pictures with grey, black, white and saturated patches."""
    numbers = uniform(mix(seed, 99), torch.arange(count), 3 * size**2)
    noise = (numbers * 256).to(torch.uint8).view(count, 3, size, size)
    coarse = noise[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :size, :size].clone()
    coarse[:, :, :8, :8] = coarse[:, :1, :8, :8]
    coarse[:, :, 8:16, :8] = 0
    coarse[:, :, 16:24, :8] = 255
    coarse[:, 0, 24:, :8] = 255
    coarse[:, 1:, 24:, :8] = 0
    return torch.cat([noise[: count // 2], coarse[count // 2 :]])


def geometry(images: Tensor, p: kernels.Parameters, config: AugmentConfig) -> Tensor:
    """Crop, flip and rotation alone."""
    scratch = torch.empty(4, len(images), *images.shape[2:], device=images.device)
    plan = kernels.make_plan(p, config, images.shape[3], sorted_by_hue=False)
    return kernels.move(images, plan, scratch).view(images.shape)


def color_jitter(images: Tensor, p: kernels.Parameters, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue alone, of float32 images in [0, 1]."""
    x, plan = images.clone().flatten(2), kernels.make_plan(p, config, images.shape[3], sorted_by_hue=False)
    scratch, constants = x.new_empty(4, len(x), 1, x.shape[2]), kernels.channels(x.device, INFO)
    kernels.jitter_(x, scratch, plan, len(plan.image) // 2, constants, config)
    return x.view(images.shape)


def erase(images: Tensor, p: kernels.Parameters) -> Tensor:
    """Erasing alone, of float32 images."""
    x = images.clone(memory_format=torch.contiguous_format).flatten(2)
    kernels.erase_(x, kernels.make_plan(p, CONFIG, images.shape[3], sorted_by_hue=False))
    return x.view(images.shape)


def reference_geometry(image: Tensor, p: kernels.Parameters, n: int, padding: int) -> Tensor:
    image = F.crop(F.pad(image, [padding]), int(p.top[n]), int(p.left[n]), *image.shape[1:])
    image = F.hflip(image) if p.flip[n] else image
    return F.rotate(image, float(p.angle[n]), InterpolationMode.NEAREST, fill=[0.0])


@pytest.mark.parametrize(
    "config",
    [CONFIG, AugmentConfig(rotation=180.0, crop_padding=12), AugmentConfig(crop_padding=0), AugmentConfig(flip=0)],
)
def test_geometry_equals_torchvision(config: AugmentConfig) -> None:
    count = 3000 if config == CONFIG else 500
    images, p = random_images(count), kernels.sample_parameters(draws_for(count), config, 32)
    images[::7] = 255  # no zeros inside: a wrong mask cannot hide
    got = geometry(images, p, config)
    expected = torch.stack([reference_geometry(images[n], p, n, config.crop_padding) for n in range(count)])
    assert got.dtype == torch.uint8
    assert int((got != expected).sum()) == 0
    assert int((got != images).sum()) > count * 1000


@pytest.mark.parametrize("size", [4, 33, *OTHER_SIZES])
@pytest.mark.parametrize("rotation", [15.0, 180.0, 0.0])
def test_geometry_of_any_size_equals_torchvision(size: int, rotation: float) -> None:
    """Equal, but where a pixel's source is in the middle between two pixels but for float32's roundings.

    There torchvision's result depends on the machine's matrix product.
    """
    config, count = AugmentConfig(rotation=rotation, crop_padding=min(12, size - 1)), 100
    images, p = random_images(count, size=size), kernels.sample_parameters(draws_for(count), config, size)
    images[::7] = 255
    got = geometry(images, p, config)
    expected = torch.stack([reference_geometry(images[n], p, n, config.crop_padding) for n in range(count)])
    wrong = (got != expected).any(1)
    middle = in_a_middle(p.angle, size)
    assert not (wrong & ~middle).any()
    assert float(middle.float().mean()) < 0.01
    assert int((got != images).sum()) > count * size**2 / 2


def in_a_middle(angles: Tensor, size: int) -> Tensor:
    """Whether a pixel's source, under a rotation, is within 1e-6 image sizes of the middle between two; [B, S, S]."""
    line = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    cosine, sine = (f(angles.double().deg2rad())[:, None, None] for f in (torch.cos, torch.sin))
    places = cosine * line - sine * line[:, None], sine * line + cosine * line[:, None]
    near = [(place + size / 2).frac().abs() for place in places]
    return (torch.minimum(near[0], 1 - near[0]) < 1e-6 * size) | (torch.minimum(near[1], 1 - near[1]) < 1e-6 * size)


@pytest.mark.parametrize(
    "config", [AugmentConfig(rotation=0), AugmentConfig(rotation=0, flip=0), AugmentConfig(rotation=0, crop_padding=0)]
)
def test_geometry_without_rotation_equals_torchvision(config: AugmentConfig) -> None:
    images, p = random_images(200), kernels.sample_parameters(draws_for(200), config, 32)
    expected = torch.stack([reference_geometry(images[n], p, n, config.crop_padding) for n in range(200)])
    assert torch.equal(geometry(images, p, config), expected)


def test_geometry_of_special_angles() -> None:
    angles = torch.tensor([0.0, 15.0, -15.0, 90.0, -90.0, 180.0, 45.0, 1e-6, 30.0])
    p = kernels.sample_parameters(draws_for(len(angles)), CONFIG, 32)
    p = p._replace(angle=angles)
    images = random_images(len(angles))
    expected = torch.stack([reference_geometry(images[n], p, n, 4) for n in range(len(angles))])
    assert torch.equal(geometry(images, p, CONFIG), expected)


def reference_jitter(image: Tensor, p: kernels.Parameters, n: int, config: AugmentConfig) -> Tensor:
    steps = [
        (F.adjust_brightness, p.brightness, config.brightness),
        (F.adjust_contrast, p.contrast, config.contrast),
        (F.adjust_saturation, p.saturation, config.saturation),
        (F.adjust_hue, p.hue, config.hue),
    ]
    for step in p.order[n].tolist():
        function, factor, size = steps[step]
        if size > 0:
            image = function(image, float(factor[n]))
    return image


def orders(count: int) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(4)))).repeat(count // 24 + 1, 1)[:count]


@pytest.mark.parametrize("config", [CONFIG, AugmentConfig(brightness=1.5, contrast=1.0, saturation=3.0, hue=0.5)])
def test_color_jitter_matches_torchvision_in_every_order(config: AugmentConfig) -> None:
    count = 24 * 20
    images = random_images(count).float().div(255)
    p = kernels.sample_parameters(draws_for(count), config, 32)._replace(order=orders(count))
    got = color_jitter(images, p, config)
    expected = torch.stack([reference_jitter(images[n], p, n, config) for n in range(count)])
    difference = (got - expected).abs().amax((1, 2, 3))
    # The mean is rounded to 2**-15, and the largest |1 - factor| scales that.
    assert float(difference.max()) <= (1e-5 if config == CONFIG else 2e-4)
    assert float(got.min()) >= 0 and float(got.max()) <= 1
    # Wrong orders would show: applied in one order for all, the results are far away.
    same = color_jitter(images, p._replace(order=p.order[:1].expand(count, 4)), config)
    assert float((same - expected).abs().amax((1, 2, 3))[1:24].median()) > 1e-3


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_color_jitter_of_any_size_matches_torchvision(size: int) -> None:
    images = random_images(48, size=size).float().div(255)
    p = kernels.sample_parameters(draws_for(48), CONFIG, size)._replace(order=orders(48))
    expected = torch.stack([reference_jitter(images[n], p, n, CONFIG) for n in range(48)])
    torch.testing.assert_close(color_jitter(images, p, CONFIG), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [3, 32, 33, 48, 1024])
def test_the_mean_is_the_same_in_any_order(side: int) -> None:
    whole = (uniform(3, torch.arange(2), side**2) * 2**14).round_().view(2, 1, -1)
    whole[1] = 2**14  # the largest sum
    exact = (whole.double().sum(dim=2, keepdim=True) / side**2).float()
    order = uniform(4, torch.arange(1), side**2)[0].argsort()
    for x in (whole, whole[:, :, order], whole.flip(2)):
        assert torch.equal(kernels.exact_mean(x), exact)


@pytest.mark.parametrize("on", [set(c) for n in (1, 2, 3) for c in itertools.combinations(range(4), n)])
def test_color_jitter_with_some_steps_off(on: set[int]) -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    config = dataclasses.replace(OFF, **{names[i]: 0.2 for i in on})
    images = random_images(48).float().div(255)
    p = kernels.sample_parameters(draws_for(48), config, 32)._replace(order=orders(48))
    expected = torch.stack([reference_jitter(images[n], p, n, config) for n in range(48)])
    got = color_jitter(images, p, config)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert float((got - images).abs().mean()) > 0.005


@pytest.mark.parametrize("size", [32, *OTHER_SIZES])
def test_erase_equals_torchvision(size: int) -> None:
    count = 500 if size == 32 else 200
    images = A.normalize(random_images(count, size=size), INFO)
    p = kernels.sample_parameters(draws_for(count), CONFIG, size)
    boxes = p.box.tolist()
    expected = torch.stack([F.erase(images[n], *boxes[n], torch.tensor(0.0)) for n in range(count)])
    got = erase(images, p)
    assert torch.equal(got, expected)
    assert not torch.signbit(got[got == 0]).any()
    assert 0.4 < float((got != images).flatten(1).any(1).float().mean()) < 0.6


FLOWERS = DatasetInfo(("rose", "tulip"), 48, (0.4, 0.3, 0.7), (0.25, 0.2, 0.3))


@pytest.mark.parametrize("info", [INFO, FLOWERS])
@pytest.mark.parametrize("size", [32, *OTHER_SIZES])
def test_normalize_equals_torchvision(size: int, info: DatasetInfo) -> None:
    images = random_images(50, size=size)
    expected = torch.stack([F.normalize(i.float().div(255), info.mean, info.std) for i in images])
    assert torch.equal(A.normalize(images, info), expected)
    assert A.normalize(images, info).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "info"), [(32, INFO), *((size, FLOWERS) for size in OTHER_SIZES)])
def test_augment_composes_the_steps(size: int, info: DatasetInfo) -> None:
    count = 256 if size == 32 else 100
    images, draws = random_images(count, size=size), draws_for(count)
    before = images.clone()
    p = kernels.sample_parameters(draws, CONFIG, size)
    x = color_jitter(geometry(images, p, CONFIG).float().div(255), p, CONFIG)
    x = erase(F.normalize(x, info.mean, info.std), p)
    got = A.augment(images, draws, CONFIG, info)
    assert torch.equal(got, x) and torch.equal(images, before)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_switched_off_is_plain_normalisation() -> None:
    images, draws = random_images(20), draws_for(20)
    assert torch.equal(A.augment(images, draws, OFF, INFO), A.normalize(images, INFO))


@pytest.mark.parametrize("cut", [1, 5, 64, 128])
def test_results_do_not_depend_on_the_split_of_a_batch(cut: int) -> None:
    images, draws = random_images(200), draws_for(200)
    whole = A.augment(images, draws, CONFIG, INFO)
    parts = [A.augment(images[s], draws[s], CONFIG, INFO) for s in (slice(None, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.arange(200).flip(0)
    assert torch.equal(A.augment(images[order], draws[order], CONFIG, INFO), whole[order])


@pytest.mark.parametrize("size", [5, *OTHER_SIZES, 224])
def test_each_sample_of_any_size_is_the_same_in_any_batch(size: int) -> None:
    images, draws = random_images(40, size=size), draws_for(40)
    whole = A.augment(images, draws, dataclasses.replace(CONFIG, crop_padding=4), FLOWERS)
    for cuts in ([1] * 40, [1, 2, 37], [39, 1], [20, 20]):
        pairs = zip(images.split(cuts), draws.split(cuts), strict=True)
        assert torch.equal(torch.cat([A.augment(i, d, CONFIG, FLOWERS) for i, d in pairs]), whole)
    assert torch.equal(A.augment(images.flip(0), draws.flip(0), CONFIG, FLOWERS), whole.flip(0))
    other = images.clone()
    other[1:] = 255 - other[1:]
    assert torch.equal(A.augment(other, draws, CONFIG, FLOWERS)[0], whole[0])


def test_results_do_not_depend_on_threads_or_global_randomness() -> None:
    images, draws, threads = random_images(200), draws_for(200), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        one, state = A.augment(images, draws, CONFIG, INFO), torch.get_rng_state()
        torch.set_num_threads(3)
        torch.manual_seed(1)
        assert torch.equal(A.augment(images, draws, CONFIG, INFO), one)
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("off", [(), ("hue",), ("contrast", "saturation"), ("rotation", "brightness")])
@pytest.mark.parametrize("size", [32, 48, 96, 224])
def test_sorting_into_parts_on_a_cpu_changes_no_bit(
    off: tuple[str, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, **dict.fromkeys(off, 0.0))
    count = 300 * 32**2 // size**2
    images, draws = random_images(count, size=size), draws_for(count)
    in_parts = A.augment(images, draws, config, INFO)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    at_once = A.augment(images, draws, config, INFO)
    assert torch.equal(in_parts, at_once) and in_parts.stride() == at_once.stride()
    few = torch.cat([A.augment(images[s], draws[s], config, INFO) for s in (slice(0), slice(3))])
    assert torch.equal(few, at_once[:3])


def test_parts_are_sorted_by_the_order_of_the_steps() -> None:
    draws = draws_for(500)
    draws[:100, 9] = draws[:100, 11]  # a tie of contrast and hue
    position = kernels.sample_parameters(draws, CONFIG, 32).order.argsort(dim=1)
    assert torch.equal(blends_before_hue(draws, CONFIG), position[:, 3])
    assert not blends_before_hue(draws, dataclasses.replace(CONFIG, hue=0.0)).any()


def test_a_part_is_one_sample_at_least_and_of_as_many_pixels_whatever_their_size() -> None:
    parts = {size: A._samples(size) for size in (4, 16, 32, 48, 64, 224, 1024)}
    assert parts == {4: 3072, 16: 192, 32: 48, 48: 21, 64: 12, 224: 1, 1024: 1}


def test_compiles_as_one_graph() -> None:
    images, draws = random_images(16), draws_for(16)
    compiled = torch.compile(A.augment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, draws, CONFIG, INFO), A.augment(images, draws, CONFIG, INFO))


def test_nothing_depends_on_data() -> None:
    """Fake tensors have no data: .item(), nonzero() and boolean indexing raise."""
    with FakeTensorMode():
        images, samples = torch.empty(8, 3, 32, 32, dtype=torch.uint8), torch.empty(8, dtype=torch.int64)
        got = A.augment(images, uniform(1, samples, kernels.DRAWS), CONFIG, INFO)
    assert got.shape == (8, 3, 32, 32)


@pytest.mark.gpu
def test_a_gpu_agrees_and_never_waits() -> None:
    images, draws = random_images(2000), draws_for(2000)
    on_device, device_draws = images.cuda(), draws.cuda()
    A.augment(on_device, device_draws, CONFIG, INFO)
    with no_waiting("cuda"):
        got = A.augment(on_device, device_draws, CONFIG, INFO)
    p, q = kernels.sample_parameters(draws, CONFIG, 32), kernels.sample_parameters(device_draws, CONFIG, 32)
    assert torch.equal(geometry(images, p, CONFIG), geometry(on_device, q, CONFIG).cpu())
    torch.testing.assert_close(got.cpu(), A.augment(images, draws, CONFIG, INFO), rtol=0, atol=1e-5)
    parts = [A.augment(on_device[s], device_draws[s], CONFIG, INFO) for s in (slice(None, 3), slice(3, None))]
    assert torch.equal(torch.cat(parts), got)


# Distributions. All draws are fixed, so each of these either always passes or always fails.
COUNT = 40_000


def sampled(config: AugmentConfig = CONFIG, size: int = 32) -> kernels.Parameters:
    return kernels.sample_parameters(draws_for(COUNT, seed=5), config, size)


def chi_square(values: Tensor, cells: int) -> float:
    """Statistic of int64 values in [0, cells) against the uniform distribution, in standard deviations."""
    counts = torch.bincount(values, minlength=cells).double()
    assert len(counts) == cells
    expected = len(values) / cells
    return (float(((counts - expected) ** 2 / expected).sum()) - (cells - 1)) / math.sqrt(2 * (cells - 1))


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples, times the root of the count (1.95 is p = 0.001)."""
    a, b = a.double().sort().values, b.double().sort().values
    both = torch.cat([a, b])
    gap = torch.searchsorted(a, both, right=True) / len(a) - torch.searchsorted(b, both, right=True) / len(b)
    return float(gap.abs().max()) * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def distance_from_uniform(values: Tensor, low: float, high: float) -> float:
    unit = ((values.double() - low) / (high - low)).sort().values
    assert float(unit[0]) >= -1e-6 and float(unit[-1]) <= 1 + 1e-6
    return float((unit - (torch.arange(len(unit)) + 0.5) / len(unit)).abs().max()) * math.sqrt(len(unit))


def test_crop_and_flip_distributions() -> None:
    p = sampled()
    assert chi_square(p.top * 9 + p.left, 81) < 4
    assert chi_square(p.flip.long(), 2) < 4
    assert chi_square(p.top * 2 + p.flip.long(), 18) < 4
    assert abs(float(sampled(AugmentConfig(flip=0.2)).flip.float().mean()) - 0.2) < 0.01
    assert bool(sampled(AugmentConfig(flip=1)).flip.all())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("angle", -15, 15),
        ("brightness", 0.8, 1.2),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ],
)
def test_continuous_parameters_are_uniform(name: str, low: float, high: float) -> None:
    assert distance_from_uniform(getattr(sampled(), name), low, high) < 1.95


def test_ranges_are_torchvisions() -> None:
    config = AugmentConfig(brightness=1.5, contrast=0.3, saturation=1.0, hue=0.5)
    reference = ColorJitter(1.5, 0.3, 1.0, 0.5)
    p = sampled(config)
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert distance_from_uniform(getattr(p, name), *getattr(reference, name)) < 1.95


def test_orders_are_equally_likely() -> None:
    order = sampled().order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(COUNT, 4))
    number = {o: n for n, o in enumerate(itertools.permutations(range(4)))}
    assert abs(chi_square(torch.tensor([number[tuple(o)] for o in order.tolist()]), 24)) < 4


def test_parameters_are_independent() -> None:
    p = sampled()
    columns = [
        p.top,
        p.left,
        p.flip,
        p.angle,
        p.brightness,
        p.contrast,
        p.saturation,
        p.hue,
        p.order[:, 0],
        p.box[:, 2] > 0,
    ]
    correlation = torch.corrcoef(torch.stack([c.double() for c in columns]))
    assert float((correlation - torch.eye(len(columns))).abs().max()) < 4.5 / math.sqrt(COUNT)


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.3, 1.0), (0.5, 4.0))])
@pytest.mark.parametrize("size", [32, 96])
def test_erased_boxes_are_distributed_as_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float], size: int
) -> None:
    p = sampled(AugmentConfig(erasing=0.5, erasing_scale=scale, erasing_ratio=ratio), size)
    on = p.box[:, 2] > 0
    assert abs(float(on.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(COUNT)
    assert torch.equal(on, p.box[:, 3] > 0)
    got = p.box[on].double()
    image = torch.zeros(3, size, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(6000)]
    expected = torch.tensor(boxes).double()
    assert bool((got[:, :2] >= 0).all()) and bool((got[:, :2] + got[:, 2:] <= size).all())
    for name, statistic in {
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "bottom": lambda b: b[:, 0] + b[:, 2],
        "right": lambda b: b[:, 1] + b[:, 3],
    }.items():
        assert distance(statistic(got), statistic(expected)) < 1.95, name


def test_a_box_that_never_fits_erases_nothing() -> None:
    p = sampled(AugmentConfig(erasing=1.0, erasing_scale=(1.0, 1.0), erasing_ratio=(1.0, 1.0)))
    assert not p.box[:, 2:].any()


def test_largest_draw_stays_in_range() -> None:
    for padding in (31, 1023):
        config = AugmentConfig(crop_padding=padding)
        p = kernels.sample_parameters(torch.full((1, kernels.DRAWS), 1 - 2**-24), config, padding + 1)
        assert int(p.top) == int(p.left) == 2 * padding
    for size in range(1, 2048):
        assert int(torch.tensor(1 - 2**-24) * size) == size - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", 32),
        ("crop_padding", -1),
        ("flip", 1.5),
        ("rotation", math.nan),
        ("brightness", -0.1),
        ("contrast", math.inf),
        ("hue", 0.6),
        ("erasing", 2),
        ("erasing_scale", (0.5, 0.1)),
        ("erasing_scale", (0.5, 1.1)),
        ("erasing_ratio", (0.0, 1.0)),
        ("erasing_ratio", (2.0, 1.0)),
    ],
)
def test_impossible_configs_are_refused(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"augment.{field}"):
        from_plain({"augment": {field: value}})
