"""Layers that give the same bits for any number of processes, in place of PyTorch's: BatchNorm by shard, masks by key.

`make_exact` swaps them in any network, as torch.nn.SyncBatchNorm.convert_sync_batchnorm does with its own."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_hpc.errors import SpecError
from cifar_hpc.randomness import hash64, words

_COLUMNS = 2**16  # random words in a row; part of the bits
_ALPHA = (
    -1.7580993408473766
)  # SELU's value far below zero (Klambauer et al. 2017, arXiv:1706.02515, section "New dropout")


def keep_mask(key: Tensor, count: int, rate: float, dtype: torch.dtype, starts: Tensor | None = None) -> Tensor:
    """Return [count] ones, and zeros with probability `rate`: a function of the key and of an element's index.

    An element is dropped where its 16 random bits, as a number, are below `rate` * 2**16; four share a random word.

    Args:
        key: int64 [], on the device of the result.
        starts: the first `rows_of(count)` words of the key or more, where they are known.
    """
    number, rows = -(-count // 4), rows_of(count)
    width, threshold = min(_COLUMNS, number), _dropped(rate) - 2**15
    if threshold == 2**15:
        return torch.zeros(count, dtype=dtype, device=key.device)
    starts = words(key, rows) if starts is None or len(starts) < rows else starts[:rows]
    columns = _columns(key.device)[:width]
    if key.device.type != "cpu" or torch.compiler.is_compiling():
        return (_mixed(columns ^ starts[:, None]).view(torch.int16) >= threshold).to(dtype).view(-1)[:count]
    # The same in the memory of one row, which stays in the cache.
    mask = torch.empty(rows, 4 * width, dtype=dtype)
    row, scratch = torch.empty_like(columns), torch.empty_like(columns)
    for start, part in zip(starts, mask, strict=True):
        torch.bitwise_xor(columns, start, out=row)
        torch.ge(_mixed(row, scratch).view(torch.int16), threshold, out=part)
    return mask.view(-1)[:count]


def rows_of(count: int) -> int:
    """Return the rows of random words that a mask of `count` elements takes."""
    return -(-count // (4 * _COLUMNS))


def _mixed(word: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Mix the bits of int64 words in place: two rounds of multiplication, which spread each bit over all 16-bit parts.

    Shifts copy the sign: exclusive or would clear the topmost bits, so the last round adds.
    """
    word.mul_(-0x40A7B892E31B1A47)
    word.bitwise_xor_(torch.bitwise_right_shift(word, 32, out=scratch))
    word.mul_(-0x6B2FB644ECCEEE15)
    return word.add_(torch.bitwise_right_shift(word, 29, out=scratch))


@functools.lru_cache(maxsize=8)
def _columns(device: torch.device) -> Tensor:
    return hash64(torch.arange(1, _COLUMNS + 1, dtype=torch.int64, device=device))


def _dropped(rate: float) -> int:
    return round(rate * 2**16)


class _Keyed(nn.Module):
    """A layer whose masks are a function of its key, which `ExactLayers.set_key` sets, and of its calls since then."""

    p: float
    inplace: bool
    key: Tensor | None
    calls: int
    rows: int  # the most that a mask has taken so far
    starts: Tensor | None  # of the first mask's rows

    def mask(self, input: Tensor, leading: int | None = None) -> Tensor:
        """Return a mask of zeros and ones for each element, or for the first `leading` dimensions of the input."""
        if self.key is None:
            raise RuntimeError("set_key must be called before a forward pass in training mode")
        key, starts = (self.key, self.starts) if self.calls == 0 else (self.key + self.calls, None)
        shape = input.shape[:leading]
        count = math.prod(shape)
        self.calls, self.rows = self.calls + 1, max(self.rows, rows_of(count))
        flat = keep_mask(key, count, self.p, input.dtype, starts)
        if leading is not None:
            return flat.view(*shape, *[1] * (input.dim() - leading))
        if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return flat.as_strided(input.shape, input.stride())  # in the order in memory, so that no pass jumps
        return flat.view(input.shape)

    def scaled(self, input: Tensor, mask: Tensor, inplace: bool) -> Tensor:
        """Return the input without what is dropped, the rest scaled up."""
        mask = mask.mul_(2**16 / max(1, 2**16 - _dropped(self.p)))
        return input.mul_(mask) if inplace else input * mask


class _Dropout(_Keyed):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return self.scaled(input, self.mask(input), self.inplace)


class _FeatureDropout(_Keyed):
    """Dropout of whole channels; Dropout1d and Dropout3d take an input without a batch, too."""

    spatial: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        alone = self.spatial != 2 and input.dim() == self.spatial + 1
        return self.scaled(input, self.mask(input, 1 if alone else 2), self.inplace)


class _AlphaDropout(_Keyed):
    """Dropout that keeps mean and variance of a network with SELU (Klambauer et al. 2017, arXiv:1706.02515)."""

    leading: int | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        dropped = _dropped(self.p) / 2**16
        if dropped == 1:
            return input * 0
        mask = self.mask(input, self.leading)
        scale = ((1 - dropped) * (1 + dropped * _ALPHA**2)) ** -0.5
        result: Tensor = (input * mask + _ALPHA * (1 - mask)) * scale - scale * _ALPHA * dropped
        return result


class _StochasticDepth(_Keyed):
    """Dropout of a whole branch, for each sample or for the batch (Huang et al. 2016, arXiv:1603.09382)."""

    mode: str

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return self.scaled(input, self.mask(input, 1 if self.mode == "row" else 0), False)


class ShardBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the images of one logical shard.

    Every shard normalises with its own statistics; the running statistics follow the shards for which
    `update_statistics` is set (shard 0), so that they do not depend on how shards are dealt out to ranks.
    """

    update_statistics = True
    calls = 0  # since `set_update_statistics`; `count_batches` adds them to num_batches_tracked, of all layers at once

    def forward(self, input: Tensor) -> Tensor:
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        if not self.training or (self.update_statistics and (mean is None or momentum is None)):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not self.update_statistics:
            mean, variance, momentum = None, None, 0.0
        else:
            self.calls += 1
        return F.batch_norm(input, mean, variance, self.weight, self.bias, True, momentum or 0.0, self.eps)


# By PyTorch's own `forward`: a class that has another one is not swapped.
_EXACT: dict[Callable[..., Any], tuple[type[nn.Module], dict[str, Any]]] = {
    nn.Dropout.forward: (_Dropout, {}),
    nn.Dropout1d.forward: (_FeatureDropout, {"spatial": 1}),
    nn.Dropout2d.forward: (_FeatureDropout, {"spatial": 2}),
    nn.Dropout3d.forward: (_FeatureDropout, {"spatial": 3}),
    nn.AlphaDropout.forward: (_AlphaDropout, {"leading": None}),
    nn.FeatureAlphaDropout.forward: (_AlphaDropout, {"leading": 2}),
    nn.BatchNorm2d.forward: (ShardBatchNorm, {}),  # that of BatchNorm1d and BatchNorm3d as well
}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


@functools.cache
def _exact_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the exact kind of a class of layers; None where it has none."""
    found = _EXACT.get(kind.forward)
    if kind.forward.__module__ == _STOCHASTIC_DEPTH:  # torchvision is not loaded for the sake of it
        found = _StochasticDepth, {}
    if found is None or issubclass(kind, found[0]):
        return None
    keyed = {"key": None, "calls": 0, "rows": 0, "starts": None} if issubclass(found[0], _Keyed) else {}
    return type(kind.__name__, (found[0], kind), {**keyed, **found[1], "__module__": kind.__module__})


class ExactLayers:
    """The exact layers of a network.

    Attributes:
        norms: the BatchNorm layers, in the network's order.
        draws: whether any layer drops anything.
    """

    def __init__(self, network: nn.Module) -> None:
        # Found once: walking through all modules takes a tenth of a millisecond, and would be done at each step.
        self.norms = [m for m in network.modules() if isinstance(m, ShardBatchNorm)]
        self._keyed = [m for m in network.modules() if isinstance(m, _Keyed)]
        self.draws = any(layer.p > 0 for layer in self._keyed)

    def keys(self, keys: Tensor) -> Tensor:
        """Return the layers' own keys, int64 [..., layers], for each key of a forward pass, int64 [...]."""
        return words(keys, len(self._keyed))

    def set_key(self, key: int | Tensor, device: torch.device) -> None:
        """Make the next forward pass's masks a function of a key.

        Args:
            key: in [-2**63, 2**63); or what `keys` has made of it, on the device.
        """
        if not self._keyed:
            return
        if not isinstance(key, Tensor):
            # No copy from the host, which would wait.
            key = self.keys(torch.full((), key, dtype=torch.int64, device=device))
        rows = max(layer.rows for layer in self._keyed)
        starts = words(key, rows)  # of all layers in one go
        for layer, own, first in zip(self._keyed, key.unbind(), starts.unbind(), strict=True):
            layer.key, layer.calls, layer.starts = own, 0, first

    @property
    def calls(self) -> int:
        """Number of masks drawn since `set_key`."""
        return sum(layer.calls for layer in self._keyed)

    def set_update_statistics(self, update: bool) -> None:
        """Switch the updates of BatchNorm's running statistics in the next forward passes in training mode."""
        for module in self.norms:
            module.update_statistics, module.calls = update, 0

    def count_batches(self) -> None:
        """Count the batches since `set_update_statistics` in num_batches_tracked: one operation for all layers."""
        counts = [(n.num_batches_tracked, n.calls) for n in self.norms if n.calls and n.num_batches_tracked is not None]
        if counts:
            torch._foreach_add_(*map(list, zip(*counts, strict=True)))


def make_exact(network: nn.Module) -> ExactLayers:
    """Swap a network's BatchNorm, dropout and stochastic depth layers for exact ones, in place, and return those.

    Parameters, buffers, hooks and names stay; so do a layer's class as `isinstance` sees it, and its other methods.

    Raises:
        SpecError: a layer gives other bits on other numbers of processes, and has no exact kind.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise SpecError(
                f"model.target: {name} is SyncBatchNorm, whose sums depend on the number of processes. HINT: "
                "BatchNorm; here it takes its statistics from a shard's images, on any number of processes."
            )
        kind = _exact_class(type(module))  # type: ignore[arg-type]
        if kind is not None:
            module.__class__ = kind
    return ExactLayers(network)
