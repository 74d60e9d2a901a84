"""Building a run's network, the built-in one or the user's own, and putting trained weights into it."""

import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from cifar_hpc.config import user_code
from cifar_hpc.config.spec import BUILT_IN, TARGET_KEYS, ModelSpec
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import RunFailedError
from cifar_hpc.models import improved_resnet
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.randomness import Stream, mix
from cifar_hpc.tensorfile import TYPES
from cifar_hpc.text import shown


def build_network(spec: ModelSpec, info: DatasetInfo, seed: int, code: Path) -> nn.Module:
    """Build the network of `spec` on the CPU, its initial weights a function of `seed` alone.

    Args:
        code: folder of the run's copies of user files (`RunPaths.user_code`).

    Raises:
        RunFailedError: the user's network cannot be built; shows the line of its file.
    """
    states = random.getstate(), sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    key = mix(seed, Stream.INIT)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(key)
            if spec.target is None:
                return ImprovedResNet(spec, len(info.classes))
            random.seed(key)
            if states[1] is not None:
                sys.modules["numpy"].random.seed(key % 2**32)
            return _build_target(spec, info, code)
    finally:
        random.setstate(states[0])
        if states[1] is not None:
            sys.modules["numpy"].random.set_state(states[1])


def _build_target(spec: ModelSpec, info: DatasetInfo, code: Path) -> nn.Module:
    assert spec.target is not None
    where = f"model.target: {shown(spec.target)}"
    make = user_code.load(spec.target, spec.code, code, "model.target")
    try:
        network = make(**arguments(make, spec.args, info))
        if not isinstance(network, nn.Module):
            raise RunFailedError(f"{where} gives a {type(network).__name__}; allowed: a torch.nn.Module.")
        if any(isinstance(module, LazyModuleMixin) for module in network.modules()):
            with torch.no_grad():  # gives lazy modules their sizes; BatchNorm learns nothing in evaluation mode
                network.eval()(torch.zeros(2, 3, info.image_size, info.image_size))
            network.train()
    except RunFailedError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        hint = " HINT: model.args are its arguments; classes, num_classes and image_size are given where it takes them."
        raise RunFailedError(user_code.explain(error, code, f"{where} cannot be built") + "." + hint) from None
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RunFailedError(f"{where}: no parameter is trainable; allowed: at least one with requires_grad.")
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point() or parameter.device.type != "cpu":
            kind = f"{parameter.dtype} on {parameter.device}"
            raise RunFailedError(f"{where}: {name} is {kind}; allowed: floating point, on the CPU at first.")
    for name, tensor in parts(network).items():
        if tensor.dtype not in TYPES.values():
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES.values())
            raise RunFailedError(f"{where}: {name} is {tensor.dtype}, which no checkpoint holds; allowed: {known}.")
    return network


def imported(spec: ModelSpec, info: DatasetInfo, code: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Describe how to build the network where this project is not: (keys for `standalone.load`, files that it needs).

    Args:
        code: as `build_network`.
    """
    if spec.target is None:
        own = {key: value for key, value in vars(spec).items() if key not in TARGET_KEYS}
        files = {"improved_resnet.py": Path(improved_resnet.__file__).read_bytes()}
        network, given, folder = BUILT_IN, {"spec": own, "classes": len(info.classes)}, "."
    else:
        make = user_code.load(spec.target, spec.code, code, "model.target")
        network, given, folder, files = spec.target, arguments(make, spec.args, info), ".", {}
        if spec.code is not None:
            copies = code / spec.code
            root, module = user_code.module_of(spec.target.rpartition(":")[0], copies)
            network, folder = f"{module}:{spec.target.rpartition(':')[2]}", str(root.relative_to(copies))
            files = {path.relative_to(copies).as_posix(): path.read_bytes() for path in copies.rglob("*.py")}
    digest = user_code.digest_of(files) if files else ""
    return {"network": network, "arguments": json.dumps(given), "code": digest, "path": folder}, files


def arguments(make: Callable[..., Any], given: Mapping[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """Return the arguments to call a user's function or class with: the given ones, and what the data tells.

    That is the number of classes, as `classes` or `num_classes`, and `image_size`, where it takes them.
    """
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return dict(given)
    known = {"image_size": info.image_size, "num_classes": len(info.classes), "classes": len(info.classes)}
    found = {name: value for name, value in known.items() if name in parameters}
    others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if others and not {"classes", "num_classes"} & found.keys():
        found["num_classes"] = len(info.classes)  # as torchvision's networks take it
    return {**found, **given}


def parts(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; those that modules share once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def put(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights and buffers into a network.

    Raises:
        ValueError: they are not those of the network; names the first.
    """
    own = parts(network)
    for name in (*own, *tensors):
        if name not in own or name not in tensors:
            raise ValueError(f"{name} is {'missing' if name in own else 'foreign'}")
        theirs, mine = tensors[name], own[name]
        if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            found = f"{theirs.dtype} {list(theirs.shape)}"
            raise ValueError(f"{name} is {found}; allowed: {mine.dtype} {list(mine.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def to_channels_last(network: nn.Module) -> nn.Module:
    """Lay the weights of 2-d convolutions out as these are fastest; others keep their order, without gaps in memory."""
    for parameter in network.parameters():
        if parameter.dim() != 4:
            parameter.data = parameter.data.clone()  # DDP's gradients have other strides than a weight with gaps
        else:
            # Not `contiguous`, which leaves weights of 1x1 as they are; DDP would warn of their gradients' strides.
            copy = torch.empty_like(parameter.data, memory_format=torch.channels_last)
            parameter.data = copy.copy_(parameter.data)
    return network


class _Cast(torch.autograd.Function):
    """Copies of weights in another type by one operation, and of their gradients in the weights' own by another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(copies, gradients)
        return None, *copies


Places = list[tuple[dict[str, Any], str]]  # of weights: a module's parameters, and a name


def castable(network: nn.Module) -> Places:
    """Return the places of the weights that autocast casts, of a network that uses each in each forward pass."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [(m._parameters, name) for m in layers for name, value in m._parameters.items() if value is not None]


@contextmanager
def cast(places: Places, dtype: torch.dtype) -> Iterator[None]:
    """Put copies in `dtype` into the places for the context: what autocast does for each alone, with the same bits."""
    own = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), copy in zip(places, _Cast.apply(dtype, *own), strict=True):
            parameters[name] = copy
        yield
    finally:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = parameter
