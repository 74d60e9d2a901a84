"""Mixup and CutMix against their papers' formulas, sample by sample, and the distributions of what is drawn."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, no_waiting
from torch import Tensor

from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import MixingConfig
from cifar_hpc.data.augment import mixing as M
from cifar_hpc.data.augment.mixing import symmetric_beta
from cifar_hpc.errors import SpecError
from cifar_hpc.randomness import Stream, mix, uniform

MIXUP, CUTMIX, BOTH = MixingConfig(mixup=0.2), MixingConfig(cutmix=1.0), MixingConfig(mixup=0.2, cutmix=1.0)
CONFIGS = [MIXUP, CUTMIX, BOTH, MixingConfig(mixup=0.8, cutmix=0.5, probability=0.6)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny operations on many threads crawl when the machine is busy."""
    torch.set_num_threads(1)  # conftest sets it back


def draws_for(count: int, seed: int = 0) -> Tensor:
    return uniform(mix(seed, Stream.MIX), torch.arange(count), M.MIXING_DRAWS)


def batch(count: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, draws."""
    images = uniform(1, torch.arange(count), 3 * size**2).view(count, 3, size, size) * 4 - 2
    return images, torch.arange(count) % 10, draws_for(count)


def authors_box(share: float, row: int, column: int, size: int) -> tuple[int, int, int, int]:
    """rand_bbox of CutMix's authors: from and to a row, from and to a column."""
    cut = int(size * math.sqrt(1.0 - share))
    edges = (row - cut // 2, row + cut // 2, column - cut // 2, column + cut // 2)
    top, bottom, left, right = (min(max(edge, 0), size) for edge in edges)
    return top, bottom, left, right


def mixed_plainly(images: Tensor, draws: Tensor, config: MixingConfig) -> tuple[Tensor, list[int], list[float]]:
    """Images, partners and weights, one sample at a time."""
    order = sorted(range(len(draws)), key=lambda n: float(draws[n, 0]))
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    shares = {alpha: symmetric_beta(draws[:, 3], alpha).tolist() for alpha in (config.mixup, config.cutmix) if alpha}
    results, weights, size = [], [], images.shape[3]
    for n, (_, mixed, method, _, row, column) in enumerate(draws.tolist()):
        own, other, weight = images[n], images[after[n]], 1.0
        cut = config.cutmix > 0 and (config.mixup == 0 or method < 0.5)
        lam = shares[config.cutmix if cut else config.mixup][n]
        if mixed >= config.probability:
            pass
        elif cut:
            top, bottom, left, right = authors_box(lam, int(row * size), int(column * size), size)
            own = own.clone()
            own[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            weight = 1 - (bottom - top) * (right - left) / size**2
        else:
            own, weight = lam * own + (1 - lam) * other, lam
        results.append(own)
        weights.append(weight)
    return torch.stack(results), [after[n] for n in range(len(draws))], weights


@pytest.mark.parametrize("size", [32, 48, 64, 96])
@pytest.mark.parametrize("config", CONFIGS)
def test_mixing_equals_the_papers_formulas(config: MixingConfig, size: int) -> None:
    images, labels, draws = batch(300, size)
    before = images.clone()
    got = M.mix_batch(images, labels, draws, config)
    expected, after, weights = mixed_plainly(images, draws, config)
    assert torch.equal(images, before)
    assert got.weight.tolist() == torch.tensor(weights).tolist()
    assert torch.equal(got.labels, labels) and torch.equal(got.other_labels, labels[after])
    # The plain formula takes 1 - share in float64.
    torch.testing.assert_close(got.images, expected, rtol=0, atol=3e-7)
    whole = torch.tensor([float(draws[n, 1]) >= config.probability for n in range(300)])
    assert torch.equal(got.images[whole], images[whole]) and bool((got.weight[whole] == 1).all())


@pytest.mark.parametrize("size", [32, 48, 64, 96])
def test_cutmix_copies_pixels_to_the_bit(size: int) -> None:
    images, labels, draws = batch(300, size)
    assert torch.equal(M.mix_batch(images, labels, draws, CUTMIX).images, mixed_plainly(images, draws, CUTMIX)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_weight_is_the_share_of_the_own_image(config: MixingConfig) -> None:
    draws = draws_for(200)
    images = torch.arange(200.0)[:, None, None, None].expand(200, 3, 32, 32).contiguous()
    got = M.mix_batch(images, torch.arange(200), draws, config)
    expected = got.weight * got.labels + (1 - got.weight) * got.other_labels
    torch.testing.assert_close(got.images.mean(dim=(1, 2, 3)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [4, 32, 33, 64, 1024])
def test_boxes_are_those_of_the_authors(size: int) -> None:
    count = 500 if size < 1024 else 20
    share = torch.cat([1 - (torch.arange(33) / 32).square(), uniform(3, torch.arange(467), 1)[:, 0]])[-count:]
    place = uniform(4, torch.arange(count), 2)
    outside = M.outside_boxes(share, place, size)
    for n in range(count):
        top, bottom, left, right = authors_box(float(share[n]), *(place[n] * size).int().tolist(), size)
        expected = torch.ones(1, size, size)
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(outside[n], expected), n


def test_partners_are_one_cycle_through_the_batch() -> None:
    for count in (2, 3, 50):
        draws = draws_for(count)
        draws[: count // 2, 0] = 0.25  # equal numbers
        after, seen, here = M.partners(draws).tolist(), [], 0
        for _ in range(count):
            seen.append(here)
            here = after[here]
        assert here == 0 and sorted(seen) == list(range(count))


def test_any_other_sample_is_as_likely_a_partner() -> None:
    pairs = torch.zeros(5, 5)
    for seed in range(2000):
        after = M.partners(draws_for(5, seed))
        pairs[torch.arange(5), after] += 1
    assert not pairs.diagonal().any()
    expected = 2000 / 4
    others = pairs[~torch.eye(5, dtype=torch.bool)]
    assert float((others - expected).abs().max()) < 4.5 * math.sqrt(expected * 3 / 4)


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_each_sample_takes_one_or_the_other_with_equal_chance(probability: float) -> None:
    count = 20_000
    config = dataclasses.replace(BOTH, mixup=1.0, probability=probability)
    pixels, weight = M.sample_shares(draws_for(count), config, 32)
    pixels = pixels.flatten(1)
    in_two = ((pixels == 0) | (pixels == 1)).all(1)
    whole = weight == 1
    # Of CutMix's boxes some have no pixel: in one of 256 draws the side is below 2.
    tolerance = 4.5 * 0.5 / math.sqrt(count) + 1 / 256
    assert abs(float((~in_two).double().mean()) - probability / 2) < tolerance
    assert abs(float((in_two & ~whole).double().mean()) - probability / 2) < tolerance
    assert abs(float(whole.double().mean()) - (1 - probability)) < tolerance


def test_draws_of_one_method_do_not_move_those_of_the_other() -> None:
    draws = draws_for(1000)
    both, mixup, cutmix = (M.sample_shares(draws, c, 32)[1] for c in (BOTH, MIXUP, CUTMIX))
    cut = draws[:, 2] < 0.5
    assert torch.equal(both, torch.where(cut, cutmix, mixup))


@pytest.mark.parametrize("config", [MixingConfig(), dataclasses.replace(BOTH, probability=0.0)])
def test_switched_off_it_is_the_identity(config: MixingConfig) -> None:
    images, labels, draws = batch(4)
    got = M.mix_batch(images, labels, draws, config)
    assert not config.on
    assert got.images is images and got.labels is labels and got.other_labels is labels
    assert got.weight.tolist() == [1, 1, 1, 1]


def test_a_sample_without_others_is_not_mixed() -> None:
    for count in (0, 1):
        images, labels, draws = batch(count)
        got = M.mix_batch(images, labels, draws, BOTH)
        assert got.images is images and got.weight.tolist() == [1.0] * count


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_type_and_memory_format_are_kept(
    config: MixingConfig, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images, labels, draws = batch(40)
    images = images.to(dtype)
    expected = M.mix_batch(images.double(), labels, draws, config).images.to(dtype)
    got = M.mix_batch(images.to(memory_format=memory_format), labels, draws, config)
    assert got.images.dtype == dtype and got.images.is_contiguous(memory_format=memory_format)
    assert got.weight.dtype == torch.float32
    torch.testing.assert_close(got.images, expected)
    plain = M.mix_batch(images, labels, draws, config)
    assert torch.equal(got.images, plain.images) and torch.equal(got.weight, plain.weight)


def test_results_do_not_depend_on_threads_or_global_randomness() -> None:
    images, labels, draws = batch(200)
    torch.manual_seed(0)
    one, state = M.mix_batch(images, labels, draws, BOTH), torch.get_rng_state()
    torch.set_num_threads(3)
    torch.manual_seed(1)
    assert all(map(torch.equal, M.mix_batch(images, labels, draws, BOTH), one))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_depends_on_data(config: MixingConfig) -> None:
    """Meta tensors have no data: .item(), nonzero() and boolean indexing raise."""
    samples = torch.empty(8, dtype=torch.int64, device="meta")
    images = torch.empty(8, 3, 32, 32, device="meta")
    mixed = M.mix_batch(images, samples, uniform(1, samples, M.MIXING_DRAWS), config)
    logits = torch.empty(8, 10, device="meta")
    assert mixed.images.shape == images.shape and mixed.weight.shape == (8,)
    assert M.mixed_loss(logits, mixed, 0.1).shape == M.mixed_correct(logits, mixed).shape == ()


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_agrees_without_waiting(device: str) -> None:
    images, labels, draws = batch(500)
    there = [t.to(device) for t in (images, labels, draws)]
    M.mix_batch(*there, BOTH)  # copies a table
    torch.use_deterministic_algorithms(True)  # conftest sets it back
    with no_waiting(device):
        got = M.mix_batch(*there, BOTH)
    expected = M.mix_batch(images, labels, draws, BOTH)
    assert torch.equal(got.other_labels.cpu(), expected.other_labels)
    torch.testing.assert_close(got.weight.cpu(), expected.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.images.cpu(), expected.images, rtol=0, atol=1e-5)


def soft_labels(mixed: M.Mixed) -> Tensor:
    own, other = (F.one_hot(labels, 10).double() for labels in (mixed.labels, mixed.other_labels))
    weight = mixed.weight.double()[:, None]
    return weight * own + (1 - weight) * other


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_soft_labels(smoothing: float) -> None:
    mixed = M.mix_batch(*batch(200), BOTH)
    logits = (uniform(9, torch.arange(200), 10) * 8 - 4).requires_grad_()
    got = M.mixed_loss(logits, mixed, smoothing)
    (gradient,) = torch.autograd.grad(got, logits)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, soft_labels(mixed), label_smoothing=smoothing, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_loss_and_hits_without_mixing_are_the_plain_ones() -> None:
    mixed = M.mix_batch(*batch(64), MixingConfig())
    logits = uniform(9, torch.arange(64), 10)
    plain = F.cross_entropy(logits, mixed.labels, label_smoothing=0.1, reduction="sum")
    assert float(M.mixed_loss(logits, mixed, 0.1)) == pytest.approx(float(plain), rel=1e-6)
    assert float(M.mixed_correct(logits, mixed)) == int((logits.argmax(1) == mixed.labels).sum())


def test_loss_of_narrow_logits_is_taken_in_float32() -> None:
    mixed = M.mix_batch(*batch(64), BOTH)
    logits = uniform(9, torch.arange(64), 10).bfloat16()
    assert torch.equal(M.mixed_loss(logits, mixed), M.mixed_loss(logits.float(), mixed))


def test_hits_are_the_shares_of_the_chosen_labels() -> None:
    mixed = M.mix_batch(*batch(500), BOTH)
    logits = uniform(9, torch.arange(500), 10)
    chosen = soft_labels(mixed).gather(1, logits.argmax(1, keepdim=True))
    got = M.mixed_correct(logits, mixed)
    assert got.dtype == torch.float64 and float(got) == pytest.approx(float(chosen.sum()), rel=1e-12)
    right = F.one_hot(mixed.labels, 10).float()
    assert float(M.mixed_correct(right, mixed)) >= float(mixed.weight.double().sum())
    same = mixed._replace(other_labels=mixed.labels)
    assert float(M.mixed_correct(right, same)) == 500  # a half and a half of one label are a whole


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup", -0.1), ("mixup", math.nan), ("cutmix", math.inf), ("cutmix", 101), ("probability", 1.5)],
)
def test_impossible_configs_are_refused(field: str, value: float) -> None:
    with pytest.raises(SpecError, match=f"mixing.{field}: .* is not allowed; allowed: a number >= 0"):
        from_plain({"mixing": {field: value}})
