"""Check that a user's network gives the same bits in every attempt, before its first step; else it is refused."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cifar_hpc.config import user_code
from cifar_hpc.errors import RunFailedError
from cifar_hpc.models.exact import ExactLayers
from cifar_hpc.models.network import parts
from cifar_hpc.tensorfile import digest
from cifar_hpc.text import counted

_KEY = 1
# What PyTorch says of a kernel of CUDA alone, so that a CPU takes the same network: the advice is about the run.
NOT_DETERMINISTIC = "does not have a deterministic implementation"
_MASKS = (
    "Masks must come from layers: torch.nn.Dropout, Dropout1d to 3d, AlphaDropout, FeatureAlphaDropout, or "
    "torchvision.ops.StochasticDepth, as attributes of the network"
)
_ADVICE = {
    "MultiheadAttention": "give it dropout=0, and put a torch.nn.Dropout behind it",
    "RReLU": "use LeakyReLU",
    "LSTM": "give it dropout=0, and put a torch.nn.Dropout between two of them",
    "GRU": "give it dropout=0, and put a torch.nn.Dropout between two of them",
}


def check_network(network: nn.Module, exact: ExactLayers, images: Tensor, classes: int, code: Path) -> Tensor:
    """Run a network on some images, twice with the same masks and once in evaluation mode; leaves no trace in it.

    Args:
        images: float32 [B, 3, S, S], as few as a shard may get.
        code: folder of the run's copies of user files, for errors.

    Returns:
        Logits of a forward pass in training mode, with their graph.

    Raises:
        RunFailedError: the network draws random numbers by itself, changes buffers other than BatchNorm's, or gives no
            logits [B, classes]; names the module.
    """
    what = counted(len(images), "image")
    names = {module: name or "the network" for name, module in network.named_modules()}
    exact.set_update_statistics(False)
    known, buffers = set(parts(network)), {name: buffer.clone() for name, buffer in network.named_buffers()}
    seen: list[list[tuple[str, str]]] = []
    try:
        for training in (False, True, True):
            network.train(training)
            exact.set_key(_KEY, images.device)
            seen.append([])
            with _watched(names, seen[-1]), torch.set_grad_enabled(training):
                logits = network(images.clone())  # which a network may change
            _check_logits(logits, len(images), classes, training)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise _explained(error, code, f"a forward pass of {what}") from None
    for name in parts(network):
        if name not in known:
            raise RunFailedError(
                f"model.target: {name} is registered in a forward pass, so a network that is built anew has no place "
                "for it. HINT: register it in __init__."
            )
    for name, buffer in network.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise RunFailedError(
                f"model.target: the buffer {name} changes in a forward pass, and each process would have another one. "
                "HINT: only BatchNorm1d to 3d may have such buffers; InstanceNorm without track_running_stats, "
                "LayerNorm and GroupNorm have none."
            )
    for first, second in zip(seen[1], seen[2], strict=False):
        if first != second:
            raise RunFailedError(
                f"model.target: {second[0]} gives another output for the same input and the same masks, so the bits of "
                f"the run would not be the same. HINT: does it draw or remember something by itself? {_MASKS}."
            )
    result: Tensor = logits
    return result


def check_gradients(network: nn.Module, loss: Tensor, exact: ExactLayers, code: Path) -> list[Tensor]:
    """Gradients of the trainable parameters, in the network's order.

    Args:
        loss: of a forward pass, with its graph.
        code: as in `check_network`.

    Raises:
        RunFailedError: the backward pass fails, some parameters get no gradient (names them), or masks were drawn a
            second time.
    """
    calls = exact.calls
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    try:
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    except Exception as error:  # of operations that the user's code has chosen
        raise _explained(error, code, "a backward pass") from None
    missing = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RunFailedError(
            f"model.target: {', '.join(missing[:3])}{more} get no gradient: the logits do not depend on them. HINT: "
            "remove them from the network, or freeze them by requires_grad_(False); torch.utils.checkpoint needs "
            "use_reentrant=False."
        )
    if exact.calls != calls:
        raise RunFailedError(
            "model.target: dropout draws other masks in the backward pass, where activation checkpointing computes "
            "layers again. HINT: leave dropout outside of what is checkpointed."
        )
    return list(gradients)


def _explained(error: BaseException, code: Path, what: str) -> BaseException:
    if isinstance(error, RunFailedError) or NOT_DETERMINISTIC in str(error):
        return error
    hint = " HINT: checkpoint(..., use_reentrant=False)." * ("use_reentrant" in str(error))
    return RunFailedError(user_code.explain(error, code, f"model.target: {what} fails") + hint)


def _check_logits(logits: Any, count: int, classes: int, training: bool) -> None:
    what = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if not isinstance(logits, Tensor) or logits.shape != (count, classes) or not logits.is_floating_point():
        mode = "training" if training else "evaluation"
        hint = (
            "it is told the number of classes as `classes` or `num_classes` where it takes one of them; else set it in "
            "model.args"
            if isinstance(logits, Tensor)
            else "return the logits alone, in both modes; an auxiliary head has no loss here, so leave it out, as by "
            "model.args={aux_logits: false} where the network has this argument"
        )
        raise RunFailedError(
            f"model.target: in {mode} mode the network gives {what} for {count} images of {classes} classes; allowed: "
            f"floating-point logits [{count}, {classes}]. HINT: {hint}."
        )


@contextmanager
def _watched(names: dict[nn.Module, str], seen: list[tuple[str, str]]) -> Iterator[None]:
    """Record (module, digest of its output) at the end of each call within the context, those within a module first.

    Raises:
        RunFailedError: from the innermost module in which the state of a global random generator changes.
    """
    states: list[str] = []

    def before(module: nn.Module, _: Any) -> None:
        states.append(_generators())

    def after(module: nn.Module, _: Any, output: Any) -> None:
        name = names.get(module, type(module).__name__)
        if states.pop() != _generators():
            kind = type(module).__name__
            advice = _ADVICE.get(kind, f"{_MASKS}, and not from functions such as F.dropout or torch.rand")
            where = kind if name == "the network" else f"{name} ({kind})"
            raise RunFailedError(f"model.target: {where} draws random numbers by itself. HINT: {advice}.")
        seen.append((name, digest([leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])))

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield


def _generators() -> str:
    """Digest of the state of all global random generators that have been used."""
    numpy = sys.modules.get("numpy")
    states = [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])
    return digest([*states, str(random.getstate()), str(numpy.random.get_state()) if numpy else ""])
