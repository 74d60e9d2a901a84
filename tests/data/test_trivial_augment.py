"""TrivialAugmentWide against torchvision, operation by operation, and the distribution of its choices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import DEVICES, no_waiting
from torch import Tensor
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from cifar_hpc.data.augment import trivial as T
from cifar_hpc.data.augment.trivial import _pixels_below, _places_when_sorted, magnitudes
from cifar_hpc.randomness import Stream, mix, uniform

REFERENCE = TrivialAugmentWide()
SPACE = REFERENCE._augmentation_space(T.BINS)
NAMES = dict(zip(T.Operation, SPACE, strict=True))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny operations on many threads crawl when the machine is busy."""
    torch.set_num_threads(1)  # conftest sets it back


def draws_for(count: int, seed: int = 0) -> Tensor:
    return uniform(mix(seed, Stream.AUGMENT), torch.arange(count), T.TRIVIAL_DRAWS)


def random_images(count: int, size: int = 32) -> Tensor:
    """Noise, smooth pictures, few levels, a narrow range, and channels of one or two levels, in turn."""
    numbers = uniform(mix(1, 99), torch.arange(count), 3 * size**2)
    noise = (numbers * 256).to(torch.uint8).view(count, 3, size, size)
    coarse = noise[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :size, :size]
    flat = noise[:, :, :1, :1].repeat(1, 1, size, size)
    two = flat.clone()
    two[:, :, 10:12] = 255
    kinds = [noise, coarse, coarse // 2 + 60, noise // 64 * 64, noise % 4 + 100, flat, two]
    images = torch.stack(kinds, dim=1).flatten(0, 1)[:count]
    images[::5, :, 28:] = 255  # no zeros there: a wrong border cannot hide
    return images


def choices(operation: T.Operation, magnitude_bin: int, negative: bool, count: int) -> T.Choices:
    return T.Choices(
        torch.full((count,), int(operation)), torch.full((count,), magnitude_bin), torch.full((count,), negative)
    )


def cases(operation: T.Operation) -> Iterator[tuple[int, bool, float]]:
    """Every bin, sign and magnitude of an operation, as torchvision has them."""
    values, signed = SPACE[NAMES[operation]]
    for number, magnitude in enumerate(values.tolist() if values.ndim else [0.0]):
        for negative in (False, True) if signed else (False,):
            yield number, negative, -float(magnitude) if negative else float(magnitude)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of a GPU, which does every operation on every sample."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("operation", T.Operation)
def test_every_operation_has_torchvisions_magnitudes(operation: T.Operation) -> None:
    values, signed = SPACE[NAMES[operation]]
    assert NAMES[operation].lower() == operation.name.replace("_", "").lower()
    assert magnitudes(operation) == (values.tolist() if values.ndim else [0.0] * T.BINS)
    assert (values.ndim > 0) == (T.Operation.SHEAR_X <= operation <= T.Operation.SOLARIZE)
    assert signed == (T.Operation.SHEAR_X <= operation <= T.Operation.SHARPNESS)


@pytest.mark.parametrize("operation", T.Operation)
def test_every_case_equals_torchvisions(operation: T.Operation) -> None:
    images, differing, changed = random_images(42), 0, 0
    for number, negative, magnitude in cases(operation):
        expected = _apply_op(images, NAMES[operation], magnitude, InterpolationMode.NEAREST, None)
        got = T.apply_choices(images, choices(operation, number, negative, len(images)))
        differing += int((got != expected).sum())
        changed += int((got != images).sum())
    assert differing == 0
    assert (changed > 0) == (operation is not T.Operation.IDENTITY)


@pytest.mark.parametrize("size", [48, 64, 96, 33, 224])
@pytest.mark.parametrize("operation", T.Operation)
def test_every_case_of_any_size_equals_torchvisions(operation: T.Operation, size: int) -> None:
    """Equal, but where a pixel's source is in the middle between two pixels but for float32's roundings.

    There torchvision's result depends on the machine's matrix product. Of 256x256 pixels, its mean is exact.
    """
    images = random_images(14, size)
    every = list(cases(operation))
    for number, negative, magnitude in every if size < 100 else every[::6]:
        expected = _apply_op(images, NAMES[operation], magnitude, InterpolationMode.NEAREST, None)
        got = T.apply_choices(images, choices(operation, number, negative, len(images)))
        wrong = (got != expected).any(1)
        middle = in_a_middle(operation, magnitude, size)
        assert not (wrong & ~middle).any(), (number, magnitude)
        assert int(middle.sum()) <= 2 * size


def in_a_middle(operation: T.Operation, magnitude: float, size: int) -> Tensor:
    """Whether a pixel's source is within 1e-6 image sizes of the middle between two; [S, S]."""
    line = torch.arange(size, dtype=torch.float64) + 0.5
    column, row, half = line.expand(size, size), line[:, None].expand(size, size), size / 2
    if operation == T.Operation.ROTATE:
        turn = math.radians(magnitude)
        x, y = column - half, row - half
        column = math.cos(turn) * x - math.sin(turn) * y + half
        row = math.sin(turn) * x + math.cos(turn) * y + half
    elif operation == T.Operation.SHEAR_X:
        column = column + magnitude * row
    elif operation == T.Operation.SHEAR_Y:
        row = row + magnitude * column
    return ((column - column.round()).abs() < 1e-6 * size) | ((row - row.round()).abs() < 1e-6 * size)


def test_a_batch_equals_torchvisions_transform_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images, chosen = random_images(600), T.sample_choices(draws_for(600))
    got = T.apply_choices(images, chosen)
    for n, (operation, magnitude_bin, negative) in enumerate(zip(*(c.tolist() for c in chosen), strict=True)):
        asked = iter([operation, magnitude_bin, int(negative)])
        monkeypatch.setattr(torch, "randint", lambda *_, asked=asked, **__: torch.tensor([next(asked)]))
        assert torch.equal(got[n], REFERENCE(images[n])), T.Operation(operation)


def test_augmenting_is_sampling_and_applying() -> None:
    images, draws = random_images(100), draws_for(100)
    before = images.clone()
    got = T.trivial_augment(images, draws)
    assert torch.equal(got, T.apply_choices(images, T.sample_choices(draws)))
    assert got.dtype == torch.uint8 and got.is_contiguous() and torch.equal(images, before)
    got.zero_()
    assert torch.equal(images, before)
    assert T.trivial_augment(images[:0], draws[:0]).shape == (0, 3, 32, 32)


def test_the_memory_format_of_the_images_does_not_matter() -> None:
    images, draws = random_images(100), draws_for(100)
    other = images.to(memory_format=torch.channels_last)
    assert torch.equal(T.trivial_augment(other, draws), T.trivial_augment(images, draws))


@pytest.mark.parametrize("cut", [1, 5, 64, 199])
def test_results_do_not_depend_on_the_split_of_a_batch(cut: int) -> None:
    images, draws = random_images(200), draws_for(200)
    whole = T.trivial_augment(images, draws)
    parts = [T.trivial_augment(images[s], draws[s]) for s in (slice(None, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.arange(200).flip(0)
    assert torch.equal(T.trivial_augment(images[order], draws[order]), whole[order])


@pytest.mark.parametrize("size", [5, 48, 64, 96, 181, 182])
def test_each_sample_of_any_size_is_the_same_in_any_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, draws = random_images(60, size), draws_for(60)
    whole = T.trivial_augment(images, draws)
    for cuts in ([1] * 60, [1, 2, 57], [30, 30]):
        pairs = zip(images.split(cuts), draws.split(cuts), strict=True)
        assert torch.equal(torch.cat([T.trivial_augment(i, d) for i, d in pairs]), whole)
    assert torch.equal(T.trivial_augment(images.flip(0), draws.flip(0)), whole.flip(0))
    at_once(monkeypatch)
    assert torch.equal(T.trivial_augment(images, draws), whole)


@pytest.mark.parametrize("size", [4, 32, 48, 181])
def test_a_table_of_sources_is_what_larger_images_compute(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, draws = random_images(100, size), draws_for(100)
    from_table = T.trivial_augment(images, draws)
    monkeypatch.setattr(T, "LARGEST_TABLE", 3)
    T.tables.cache_clear()
    try:
        assert T.tables(size, images.device).source.shape == (372, 6)
        assert torch.equal(T.trivial_augment(images, draws), from_table)
    finally:
        T.tables.cache_clear()


def test_the_largest_images_have_a_source_for_their_last_pixel() -> None:
    images = random_images(1, 1024)
    for operation in (T.Operation.IDENTITY, T.Operation.TRANSLATE_X, T.Operation.SHEAR_Y):
        expected = _apply_op(images, NAMES[operation], 0.0, InterpolationMode.NEAREST, None)
        assert torch.equal(T.apply_choices(images, choices(operation, 0, False, 1)), expected)


@pytest.mark.parametrize("cut", [1, 77])
def test_results_at_once_do_not_depend_on_the_split_either(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, draws = random_images(200), draws_for(200)
    whole = T.trivial_augment(images, draws)
    at_once(monkeypatch)
    parts = [T.trivial_augment(images[s], draws[s]) for s in (slice(None, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)


def test_sorting_by_operation_on_a_cpu_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    images, draws = random_images(1000), draws_for(1000)
    in_groups = T.trivial_augment(images, draws)
    at_once(monkeypatch)
    assert torch.equal(T.trivial_augment(images, draws), in_groups)


def test_counting_and_sorting_find_the_same_places() -> None:
    channels = random_images(70).flatten(0, 1).flatten(1)
    assert torch.equal(_pixels_below(channels), _places_when_sorted(channels))


def test_results_do_not_depend_on_threads_or_global_randomness() -> None:
    images, draws = random_images(200), draws_for(200)
    torch.manual_seed(0)
    one, state = T.trivial_augment(images, draws), torch.get_rng_state()
    torch.set_num_threads(3)
    torch.manual_seed(1)
    assert torch.equal(T.trivial_augment(images, draws), one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_depends_on_data() -> None:
    """Meta tensors have no data: .item(), nonzero() and boolean indexing raise."""
    samples = torch.empty(8, dtype=torch.int64, device="meta")
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    got = T.trivial_augment(images, uniform(1, samples, T.TRIVIAL_DRAWS))
    assert got.shape == images.shape and got.dtype == torch.uint8 and got.device.type == "meta"


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gives_the_same_bits_without_waiting(device: str) -> None:
    images, draws = random_images(2000), draws_for(2000)
    there, draws_there = images.to(device), draws.to(device)
    T.trivial_augment(there, draws_there)  # copies the tables
    torch.use_deterministic_algorithms(True)  # conftest sets it back
    with no_waiting(device):
        got = T.trivial_augment(there, draws_there)
    assert torch.equal(got.cpu(), T.trivial_augment(images, draws))


# Distributions. All draws are fixed, so each of these either always passes or always fails.
COUNT = 60_000


def chi_square(values: Tensor, cells: int) -> float:
    """Statistic of int64 values in [0, cells) against the uniform distribution, in standard deviations."""
    counts = torch.bincount(values, minlength=cells).double()
    assert len(counts) == cells
    expected = len(values) / cells
    return (float(((counts - expected) ** 2 / expected).sum()) - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_all_operations_are_equally_likely() -> None:
    assert abs(chi_square(T.sample_choices(draws_for(COUNT)).operation, len(T.Operation))) < 4


def test_bins_and_signs_are_equally_likely_where_torchvision_draws_them() -> None:
    chosen = T.sample_choices(draws_for(COUNT))
    for operation in T.Operation:
        values, signed = SPACE[NAMES[operation]]
        own = chosen.operation == operation
        bins, negative = chosen.magnitude_bin[own], chosen.negative[own]
        if values.ndim:
            assert abs(chi_square(bins, T.BINS)) < 4, operation
        else:
            assert not bins.any()
        if signed:
            assert abs(chi_square(bins * 2 + negative.long(), 2 * T.BINS)) < 4, operation
            assert abs(chi_square(negative.long(), 2)) < 4, operation
        else:
            assert not negative.any()


def test_choices_do_not_depend_on_one_another() -> None:
    chosen = T.sample_choices(draws_for(COUNT))
    both = (chosen.operation >= T.Operation.SHEAR_X) & (chosen.operation <= T.Operation.SHARPNESS)
    correlation = torch.corrcoef(torch.stack([c[both].double() for c in chosen]))
    assert float((correlation - torch.eye(3)).abs().max()) < 4.5 / math.sqrt(int(both.sum()))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_in_range(draw: float) -> None:
    last = draw > 0
    signed = torch.tensor([[9.5 / 14, draw, draw], [11.5 / 14, draw, draw], [draw, draw, draw]])
    chosen = T.sample_choices(signed)
    assert chosen.operation.tolist() == [9, 11, 13 if last else 0]
    assert chosen.magnitude_bin.tolist() == [30, 30, 0] if last else [0, 0, 0]
    assert chosen.negative.tolist() == [not last, False, False]
