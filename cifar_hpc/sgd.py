"""torch.optim.SGD without what it does for torch.compile, and what it decays.

PyTorch wraps each method of an optimizer so that torch.compile leaves it alone, and the first call of a wrapper imports
torch._dynamo, which takes most of a second at each start. Here nothing but the model is ever compiled, so the methods
are called as they are. Where a PyTorch wraps them in another way, this class is only as slow to start as its parent.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from cifar_hpc.spec import OptimizerSpec


class SGD(torch.optim.SGD):
    """The same updates, to the last bit."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def build_sgd(model: nn.Module, spec: OptimizerSpec) -> SGD:
    """SGD over all parameters of `model`, in the model's order, with weight decay on all or on those of layers alone.

    Parameters of one dimension are BatchNorm's and biases. To spare them in a group of their own would change the order
    of parameters, in which checkpoints hold momentum and slow weights.
    """
    decay = spec.weight_decay if spec.decay_all else 0.0
    sgd = SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=decay, nesterov=spec.nesterov)
    if not spec.decay_all and spec.weight_decay > 0:
        decayed: list[Tensor] = [p for p in model.parameters() if p.dim() > 1]

        def decay_layers(*_: object) -> None:
            with torch.no_grad():
                grads = [p.grad for p in decayed if p.grad is not None]  # every layer has one
                torch._foreach_add_(grads, decayed, alpha=spec.weight_decay)

        sgd.register_step_pre_hook(decay_layers)
    return sgd
