"""All randomness of a run, as pure functions of integers (counter-based; nothing here has a state).

A generator with a state has to be saved, restored and re-split at every preemption. A hash of (seed, stream,
epoch, step, sample) does not: the same question always gets the same answer, whatever ran before, on
whichever rank or device.

Source: the finaliser and increment of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014; constants of Stafford's variant 13), used as a counter-based generator in the manner
of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

The numbers are part of the checkpoint contract: changing any of them breaks every resumed run, so the tests
hold golden values.
"""

import functools
from enum import IntEnum

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """Domain of a key: what the numbers are for. Values are for ever; add new ones, never renumber."""

    PERMUTATION = 1
    AUGMENT = 2
    DROPOUT = 3
    INIT = 4
    BN_ESTIMATE = 5
    SYNTHETIC = 6
    MIX = 7
    SPLIT = 8
    TRIVIAL = 9


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` (torch has no full uint64 arithmetic)."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


_GAMMA_S, _MULTIPLY_1_S, _MULTIPLY_2_S = _signed(_GAMMA), _signed(_MULTIPLY_1), _signed(_MULTIPLY_2)


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK64
    z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK64
    return z ^ (z >> 31)


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    # int64 shifts right arithmetically; the mask clears the copies of the sign bit.
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def _finalise_tensor(z: Tensor) -> Tensor:
    """`_finalise` elementwise on int64; torch's integer multiplication wraps around on every device."""
    z = _xor_shift(z, 30) * _MULTIPLY_1_S
    z = _xor_shift(z, 27) * _MULTIPLY_2_S
    return _xor_shift(z, 31)


def hash64(numbers: Tensor) -> Tensor:
    """Hash int64 numbers, elementwise, to int64."""
    return _finalise_tensor(numbers * _GAMMA_S)


def words(keys: Tensor, count: int) -> Tensor:
    """Random words, int64 [..., count], the first of any larger count: a function of each key, int64 [...]."""
    return _finalise_tensor(_counters(count, keys.device) + keys[..., None])


@functools.cache
def _counters(count: int, device: torch.device) -> Tensor:
    """Hashes of 1 to `count`, the same ones for each key."""
    return _finalise_tensor(torch.arange(1, count + 1, dtype=torch.int64, device=device))


def mix(*values: int) -> int:
    """Hash integers, in order, to a key in [0, 2**63).

    Values are taken modulo 2**64, so negative ones are fine; `mix(1)` and `mix(1, 0)` differ.
    Use `mix(seed, Stream.X, ...)` so that two purposes never share numbers.

    Raises:
        ValueError: without a value, or for one outside [-2**63, 2**64).
    """
    if not values:
        raise ValueError("mix() needs at least one value")
    state = 0
    for value in values:
        if not -(1 << 63) <= value <= _MASK64:
            raise ValueError(f"mix() takes values in [-2**63, 2**64), got {value}")
        state = _finalise((state + _GAMMA + _finalise(int(value) & _MASK64)) & _MASK64)
    return state >> 1


def mix_each(keys: Tensor, value: int) -> Tensor:
    """Return `mix(key, value)` of each key, int64 [B] in [0, 2**63)."""
    state = _finalise_tensor(_finalise_tensor(keys) + _GAMMA_S)
    state = _finalise_tensor(state + _signed(_GAMMA + _finalise(value)))
    return (state >> 1) & (_MASK64 >> 1)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order in which an epoch visits the data set.

    Sorts 64-bit hashes of 0..size-1 (stably, so that even a collision has one meaning). Touches no global
    generator, and sorting integers does not depend on the number of threads.

    Returns:
        int64 [size] on the CPU: each of 0..size-1 once.

    Raises:
        ValueError: for a negative size.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    # The device is named because torch.set_default_device would otherwise move the result.
    counter = torch.arange(size, dtype=torch.int64, device="cpu")
    hashes = _finalise_tensor((counter + 1) * _GAMMA_S + mix(seed, Stream.PERMUTATION, epoch))
    return torch.sort(hashes, stable=True).indices


def uniform(key: int | Tensor, samples: Tensor, draws: int) -> Tensor:
    """Uniform numbers, each a pure function of (key, sample, draw): a batch may be split in any way.

    Args:
        key: int in [-2**63, 2**63), usually `mix(seed, Stream.AUGMENT, epoch, step)`; or an int64 tensor on the
            samples' device: of no dimensions, or [B] for a key of each sample.
        samples: int64 [B], indices into the data set, on any device.
        draws: how many numbers a sample gets; a larger value only appends columns.

    Returns:
        float32 [B, draws] on the samples' device: multiples of 2**-24 in [0, 1), the
        same bits on CPU and CUDA.

    Raises:
        ValueError: if samples is not int64 [B], or draws is negative.
    """
    if samples.dtype != torch.int64 or samples.dim() != 1:
        raise ValueError(f"samples must be int64 [B], got {samples.dtype} {list(samples.shape)}")
    if draws < 0:
        raise ValueError(f"draws must not be negative, got {draws}")
    # Separate rounds for sample, key and draw: one round over a sum of counters would give (sample, draw)
    # pairs on one line of the lattice the same number. And each counter goes through the hash before anything
    # multiplies it: Inductor would fold `arange * constant` into its loop index, where the overflow is
    # undefined behaviour in C++ (seen: a corrupted heap).
    rows = _finalise_tensor(_finalise_tensor(samples) + key)
    columns = _finalise_tensor(torch.arange(1, draws + 1, dtype=torch.int64, device=samples.device))
    bits = (_finalise_tensor(rows[:, None] + columns) >> 40) & 0xFFFFFF
    return bits.to(torch.float32) * 2.0**-24
