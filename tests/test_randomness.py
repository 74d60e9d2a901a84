"""Randomness: golden values for ever, statistics, and independence of how a batch is split."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cifar_hpc.randomness import Stream, mix, mix_each, permutation, uniform, words

KEY = mix(7, Stream.AUGMENT, 3, 11)
GOLDEN_MIX = [
    8147104208329303767,
    6915206964022700985,
    5961565333936754605,
    3090222187561359524,
    3940471726596636740,
    593317918458769479,
]
GOLDEN_PERMUTATIONS = [
    [5, 9, 1, 4, 7, 6, 0, 8, 3, 2],
    [2, 7, 5, 4, 8, 0, 6, 9, 3, 1],
    [0, 6, 8, 7, 5, 1, 2, 3, 9, 4],
]
GOLDEN_WEIGHTED_SUM = 31269984106081
GOLDEN_UNIFORM = [
    [14137671, 5360500, 2981579],
    [10339719, 4880639, 1220052],
    [6469376, 6312125, 456295],
    [1462503, 1809281, 14175126],
    [16646866, 14752394, 7198865],
]


def test_mix_golden_values() -> None:
    assert [mix(0), mix(1), mix(-1), mix(1, 0), mix(0, 1), KEY] == GOLDEN_MIX


def test_mix_separates_order_length_and_sign() -> None:
    values = [mix(*v) for n in (1, 2, 3) for v in itertools.product((-1, 0, 1, 2, 2**40), repeat=n)]
    assert len(set(values)) == len(values)
    assert all(0 <= v < 2**63 for v in values)


def test_mix_refuses_what_it_would_have_to_truncate() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mix()
    for value in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=str(value)):
            mix(value)


def test_stream_numbers_are_for_ever() -> None:
    assert {s.name: s.value for s in Stream} == {
        "PERMUTATION": 1,
        "AUGMENT": 2,
        "DROPOUT": 3,
        "INIT": 4,
        "BN_ESTIMATE": 5,
        "SYNTHETIC": 6,
        "MIX": 7,
        "SPLIT": 8,
        "TRIVIAL": 9,
    }


def test_permutation_golden_values() -> None:
    assert permutation(0, 0, 10).tolist() == GOLDEN_PERMUTATIONS[0]
    assert permutation(0, 1, 10).tolist() == GOLDEN_PERMUTATIONS[1]
    assert permutation(1, 0, 10).tolist() == GOLDEN_PERMUTATIONS[2]
    weights = torch.arange(50_000)
    assert int((permutation(5, 399, 50_000) * weights).sum()) == GOLDEN_WEIGHTED_SUM


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutation_holds_each_index_once(size: int) -> None:
    order = permutation(3, 2, size)
    assert order.dtype == torch.int64 and order.device.type == "cpu"
    assert torch.equal(order.sort().values, torch.arange(size))


def test_permutation_ignores_global_state_and_threads() -> None:
    torch.manual_seed(1)
    first = permutation(3, 2, 50_000)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        torch.manual_seed(1)
        assert torch.equal(permutation(3, 2, 50_000), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_permutations_of_epochs_are_unrelated() -> None:
    size, epochs = 1000, 40
    ranks = torch.stack([permutation(0, epoch, size) for epoch in range(epochs)]).double()
    correlation = torch.corrcoef(ranks)
    off = correlation[~torch.eye(epochs, dtype=torch.bool)]
    assert float(off.abs().max()) < 4.5 / size**0.5
    # Every index is as likely at the front as at the back.
    assert float((ranks.mean(0) - (size - 1) / 2).abs().max()) < 4.5 * size / (12 * epochs) ** 0.5
    assert permutation(0, 0, 4).shape == (4,)
    counts = torch.zeros(4, 4)
    for epoch in range(4000):
        counts[torch.arange(4), permutation(9, epoch, 4)] += 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_permutation_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match="size"):
        permutation(0, 0, -1)


def test_uniform_golden_values() -> None:
    values = uniform(KEY, torch.tensor([0, 1, 49_999, 2**40, -1]), 3) * 2**24
    assert values.to(torch.int64).tolist() == GOLDEN_UNIFORM


def test_uniform_is_float32_multiples_in_the_unit_interval() -> None:
    values = uniform(KEY, torch.arange(20_000), 50)
    assert values.dtype == torch.float32 and values.shape == (20_000, 50)
    assert float(values.min()) >= 0 and float(values.max()) <= 1 - 2**-24
    assert torch.equal(values * 2**24, (values * 2**24).round())
    # All 24 bits are in use.
    bits = (values * 2**24).long()
    assert all(abs(float((bits >> bit & 1).float().mean()) - 0.5) < 0.003 for bit in range(24))


def test_uniform_follows_the_reference_in_python_integers() -> None:
    def finalise(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    samples = [0, 5, 49_999, 2**62]
    rows = [finalise((finalise(s) + KEY) % 2**64) for s in samples]
    expected = [[finalise((row + finalise(d + 1)) % 2**64) >> 40 for d in range(8)] for row in rows]
    assert (uniform(KEY, torch.tensor(samples), 8) * 2**24).long().tolist() == expected


@pytest.mark.parametrize("key", [0, KEY, mix(KEY, 1)])
def test_uniform_passes_chi_square(key: int) -> None:
    values = uniform(key, torch.arange(10_000), 20)
    bins = 256
    for sample in (values, values[:, :1], values[:500]):
        counts = torch.histc(sample.flatten(), bins, 0, 1).double()
        expected = sample.numel() / bins
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert 255 - 4 * 510**0.5 < statistic < 255 + 4 * 510**0.5  # too even is as wrong as too uneven


def test_neighbours_are_uncorrelated() -> None:
    samples = torch.arange(10_000)
    values = uniform(KEY, samples, 30).double() - 0.5
    pairs = {
        "sample": (values[:-1], values[1:]),
        "draw": (values[:, :-1], values[:, 1:]),
        "diagonal": (values[:-1, :-1], values[1:, 1:]),
        "anti-diagonal": (values[:-1, 1:], values[1:, :-1]),
        "key": (values, uniform(KEY + 1, samples, 30).double() - 0.5),
        "step": (values, uniform(mix(7, Stream.AUGMENT, 3, 12), samples, 30).double() - 0.5),
        "stream": (values, uniform(mix(7, Stream.DROPOUT, 3, 11), samples, 30).double() - 0.5),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean()) * 12
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, name
        # And no dependence that correlation misses: the joint distribution on an 8 x 8 grid.
        cells = ((a + 0.5) * 8).long() * 8 + ((b + 0.5) * 8).long()
        counts = torch.bincount(cells.flatten(), minlength=64).double()
        expected = a.numel() / 64
        assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 4.5 * 126**0.5, name


def test_uniform_has_no_repeated_rows() -> None:
    values = (uniform(KEY, torch.arange(50_000), 3) * 2**24).long()
    assert len(torch.unique(values[:, 0] * 2**24 + values[:, 1])) == 50_000


def test_uniform_does_not_depend_on_the_split_of_a_batch() -> None:
    samples = permutation(0, 0, 1001)
    whole = uniform(KEY, samples, 7)
    for cut in (1, 17, 500):
        parts = torch.cat([uniform(KEY, samples[:cut], 7), uniform(KEY, samples[cut:], 7)])
        assert torch.equal(parts, whole)
    order = permutation(0, 1, 1001)
    assert torch.equal(uniform(KEY, samples[order], 7), whole[order])
    assert torch.equal(uniform(KEY, samples, 3), whole[:, :3])
    assert uniform(KEY, samples[:0], 7).shape == (0, 7)


def test_uniform_takes_a_tensor_key() -> None:
    samples = torch.arange(100)
    assert torch.equal(uniform(torch.tensor(KEY), samples, 5), uniform(KEY, samples, 5))


def test_uniform_takes_a_key_for_each_sample() -> None:
    samples, keys = torch.tensor([7, 7, 2]), torch.tensor([KEY, 3, KEY])
    alone = [uniform(int(key), sample[None], 5)[0] for key, sample in zip(keys, samples, strict=True)]
    assert torch.equal(uniform(keys, samples, 5), torch.stack(alone))


def test_mix_each_is_mix() -> None:
    keys = [0, 1, KEY, 2**63 - 1]
    for value in (0, int(Stream.TRIVIAL), 2**63):
        assert mix_each(torch.tensor(keys), value).tolist() == [mix(key, value) for key in keys]


def test_words_of_a_key_do_not_depend_on_the_other_keys_or_the_count() -> None:
    keys = torch.tensor([[3, KEY], [-1, 0]])
    whole = words(keys, 6)
    assert whole.shape == (2, 2, 6)
    assert torch.equal(whole[0, 1, :4], words(keys[0, 1], 4))
    assert len(whole.unique()) == whole.numel()


def test_uniform_refuses_wrong_samples() -> None:
    for samples in (torch.arange(4, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="int64"):
            uniform(0, samples, 1)
    with pytest.raises(ValueError, match="draws"):
        uniform(0, torch.arange(2), -1)


def test_uniform_multiplies_no_plain_counter() -> None:
    """Inductor folds `arange * constant` into a loop index that overflows in C++; with torch 2.12 on a CPU that
    corrupted the heap. Compiling for real takes half a minute, so this looks at the operations instead.
    """
    graph = make_fx(lambda samples: uniform(5, samples, 3))(torch.arange(4)).graph
    products = [node for node in graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    inputs = [node.args[0].target for node in products if not isinstance(node.args[1], float)]
    assert len(inputs) == 8  # two in each of four rounds
    assert set(inputs) == {torch.ops.aten.bitwise_xor.Tensor}


@pytest.mark.gpu
def test_uniform_has_the_same_bits_on_the_gpu() -> None:
    samples = torch.arange(50_000)
    assert torch.equal(uniform(KEY, samples.cuda(), 40).cpu(), uniform(KEY, samples, 40))
