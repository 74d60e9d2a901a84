"""torch.optim.SGD without what it does for torch.compile.

PyTorch wraps each method of an optimizer so that torch.compile leaves it alone, and the first call of a wrapper imports
torch._dynamo, which takes most of a second at each start. Here nothing but the model is ever compiled, so the methods
are called as they are. Where a PyTorch wraps them in another way, this class is only as slow to start as its parent.
"""

from __future__ import annotations

import inspect

import torch


class SGD(torch.optim.SGD):
    """The same updates, to the last bit."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
