"""SGD and AdamW, Lookahead around any torch optimizer, and an exponential moving average of the weights.

Lookahead: Zhang et al. 2019 (arXiv:1907.08610). Averages: Polyak and Juditsky 1992; Tarvainen 2017."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_hpc.config.spec import OPTIMIZERS, OptimizerSpec, Spec


class SGD(torch.optim.SGD):
    """The same updates, to the last bit."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def build_inner(model: nn.Module, spec: OptimizerSpec, fused: bool = False) -> Optimizer:
    """Return the optimizer of `spec` over all parameters of `model`, with weight decay on all or on layers only.

    Parameters of one dimension are BatchNorm's and biases. A group of their own without decay would change the order of
    parameters, in which checkpoints hold the optimizer's state and slow weights. For the same reason the biases' rate
    is a factor of their gradients, which SGD's updates are proportional to: weight decay keeps the common rate, as in
    airbench (Jordan 2024, arXiv:2404.00498).

    Args:
        fused: an update is one kernel, and the rate a tensor on the device, so that a CUDA graph may hold it. The bits
            are not those of separate operations.
    """
    name, options = OPTIMIZERS[spec.name]
    decay = spec.weight_decay if spec.decay_all else 0.0
    kind: type[Optimizer] = {"SGD": SGD, "AdamW": torch.optim.AdamW}[name]
    given = {key: getattr(spec, key) for key in options}
    bias_factor = given.pop("bias_factor", 1.0)
    if fused:
        given |= {"fused": True} if name == "SGD" else {"fused": True, "capturable": True}
    optimizer = kind(model.parameters(), lr=spec.lr, weight_decay=decay, **given)  # type: ignore[call-arg]
    for group in optimizer.param_groups if fused else ():
        group["lr"] = torch.full((), spec.lr, dtype=torch.float32, device=group["params"][0].device)
    biases = [p for key, p in model.named_parameters() if key.endswith("bias") and p.requires_grad]
    if bias_factor != 1 and biases:

        @torch.no_grad()
        def scale_biases(*_: object) -> None:
            torch._foreach_mul_([p.grad for p in biases if p.grad is not None], bias_factor)

        optimizer.register_step_pre_hook(scale_biases)
    layers: list[Tensor] = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    if not spec.decay_all and spec.weight_decay > 0 and layers:

        @torch.no_grad()
        def decay_layers(*_: object) -> None:
            if name == "AdamW":  # decoupled: Loshchilov and Hutter 2019, arXiv:1711.05101
                torch._foreach_mul_(layers, 1 - optimizer.param_groups[0]["lr"] * spec.weight_decay)
            else:
                grads = [p.grad for p in layers if p.grad is not None]  # every layer has one
                torch._foreach_add_(grads, layers, alpha=spec.weight_decay)

        optimizer.register_step_pre_hook(decay_layers)
    return optimizer


def build_optimizer(model: nn.Module, spec: Spec, fused: bool = False) -> Optimizer:
    """Return the optimizer of a run, and Lookahead around it where the spec says so; `fused` as in `build_inner`."""
    inner, look = build_inner(model, spec.optimizer, fused), spec.lookahead
    return Lookahead(inner, look.k, look.alpha) if look.enabled else inner


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next updates, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


_UNFUSED = {"fused": None, "capturable": False}


def plain_state(optimizer: Optimizer, rate: float) -> dict[str, Any]:
    """Return the state for a checkpoint: the same form on every device.

    Args:
        rate: the learning rate of the last update, which may be a tensor here.
    """
    state = optimizer.state_dict()
    inner = state.get("inner", state)
    for group in inner["param_groups"]:
        group |= {"lr": rate, **{key: value for key, value in _UNFUSED.items() if key in group}}
    return state


def load_plain_state(optimizer: Optimizer, state: Mapping[str, Any]) -> float:
    """Copy a state that `plain_state` has made, maybe on another device, and return its rate.

    The options stay those of the spec, and of this device.
    """
    inner, own = state.get("inner", state), optimizer.state_dict()
    mixed = {"state": inner["state"], "param_groups": own.get("inner", own)["param_groups"]}
    optimizer.load_state_dict({**state, "inner": mixed} if "inner" in state else mixed)
    rate: float = inner["param_groups"][0]["lr"]
    set_rate(optimizer, rate)
    return rate


class Lookahead(Optimizer):
    """Wraps `inner`, which updates the fast weights (the parameters themselves).

    After every `k` updates: slow += alpha * (fast - slow); fast = slow. The slow weights start as a clone of the
    parameters at construction. `param_groups` and `state` are the inner optimizer's own, so learning rate schedulers
    and GradScaler act on it directly. A step that GradScaler skips never reaches `step`, and so does not count.

    BatchNorm statistics are not parameters: they follow the fast weights' activations. Code that evaluates under
    `slow_weights` has to provide others (`evaluation.py` estimates them).

    Args:
        inner: any torch optimizer, already constructed.
        k: updates between two syncs, >= 1.
        alpha: step size of the slow weights, in (0, 1].

    Attributes:
        slow: the slow weights, in the order of the parameters in `param_groups`.
    """

    def __init__(self, inner: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1:
            raise ValueError(f"k must be >= 1, not {k}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {alpha}")
        self.slow: list[Tensor] = []
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.k, self.alpha, self.counter = k, alpha, 0
        self._share_inner()
        self.slow = [p.detach().clone() for p in self._parameters()]

    def _share_inner(self) -> None:
        # load_state_dict and add_param_group replace the inner optimizer's containers; this follows them.
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the fast weights and, at every k-th update, sync."""
        loss = self.inner.step(closure) if closure is not None else self.inner.step()
        sync = self.syncs_next
        self.counter += 1
        if sync:
            self._sync()
        return loss

    @property
    def syncs_next(self) -> bool:
        """Return whether the next update is followed by a sync."""
        return (self.counter + 1) % self.k == 0

    def _sync(self) -> None:
        fast = self._parameters()
        torch._foreach_add_(self.slow, torch._foreach_sub(fast, self.slow), alpha=self.alpha)
        torch._foreach_copy_(fast, self.slow)

    def slow_weights(self) -> AbstractContextManager[None]:
        """Put the slow weights into the parameters for the context. Afterwards the fast ones are back, bit for bit."""
        return replaced(self._parameters(), self.slow)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the parameters' gradients."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer. Its slow weights start as a copy of its parameters."""
        if any(param_group is g for g in self.inner.param_groups):
            self.param_groups.append(param_group)  # called by the base class for the inner groups
            return
        self.inner.add_param_group(param_group)
        self._share_inner()
        self.slow += [p.detach().clone() for p in self.inner.param_groups[-1]["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return {"inner": the inner optimizer's state, "slow": [Tensor, ...], "counter": updates, "k", "alpha"}."""
        numbers = {"counter": self.counter, "k": self.k, "alpha": self.alpha}
        return {"inner": self.inner.state_dict(), "slow": list(self.slow), **numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this optimizer.

        Raises:
            ValueError: number or shapes of the slow weights do not fit the parameters.
        """
        shapes = [s.shape for s in self.slow]
        if [s.shape for s in state_dict["slow"]] != shapes:
            raise ValueError("the slow weights' shapes do not fit the parameters")
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))  # torch itself would share the momentum
        self._share_inner()
        with torch.no_grad():
            for slow, saved in zip(self.slow, state_dict["slow"], strict=True):
                slow.copy_(saved)
        self.counter, self.k, self.alpha = state_dict["counter"], state_dict["k"], state_dict["alpha"]


@contextmanager
def replaced(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Put `values` into `parameters` for the context. Afterwards their own are back, bit for bit."""
    with restored(parameters):
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)
        yield


@contextmanager
def restored(tensors: list[Tensor]) -> Iterator[None]:
    """Put the values of `tensors` back after the context, bit for bit."""
    own = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, own, strict=True):
                tensor.copy_(value)


class WeightAverage:
    """Exponential moving average of `parameters`, which starts as their clone.

    After update number n it is average + (1 - d) * (weights - average) with d = min(decay, (1 + n) / (10 + n)), so that
    the random initial weights soon lose their influence (tf.train.ExponentialMovingAverage, num_updates).

    Args:
        parameters: of the model, which an optimizer changes.
        decay: share of the average that an update keeps, in (0, 1).
        fused: the weight of the next update is a tensor, so that a CUDA graph may hold the update.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, fused: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay}")
        self.decay = decay
        self._parameters = list(parameters)
        self.average = [p.detach().clone() for p in self._parameters]
        self._weight: float | Tensor = 0.0
        if fused:
            self._weight = torch.zeros((), device=self._parameters[0].device)

    def set_weight(self, updates: int) -> None:
        """Set the weight of the next update, which is number `updates`, counted from 1."""
        weight = 1 - min(self.decay, (1 + updates) / (10 + updates))
        if isinstance(self._weight, Tensor):
            self._weight.fill_(weight)
        else:
            self._weight = weight

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights as they are now, with the weight that `set_weight` has set."""
        change = torch._foreach_sub(self._parameters, self.average)
        if isinstance(self._weight, Tensor):
            torch._foreach_mul_(change, self._weight)
            torch._foreach_add_(self.average, change)
        else:  # rounds once
            torch._foreach_add_(self.average, change, alpha=self._weight)

    @torch.no_grad()
    def load(self, average: Sequence[Tensor]) -> None:
        """Copy a saved average into this one.

        Raises:
            ValueError: its shapes do not fit.
        """
        if [a.shape for a in average] != [a.shape for a in self.average]:
            raise ValueError("the averaged weights' shapes do not fit the parameters")
        for mine, saved in zip(self.average, average, strict=True):
            mine.copy_(saved)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Put the average into the parameters for the context. Afterwards their own values are back, bit for bit."""
        return replaced(self._parameters, self.average)
