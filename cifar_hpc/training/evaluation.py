"""Evaluation of the averaged or slow weights, with the same figures for every number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_hpc.config.schedule import resizes, training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.pipeline import normalize
from cifar_hpc.randomness import Stream, mix, permutation
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.optim import restored

_PIXELS = 500 * 32 * 32  # of a batch
# Called between batches on every rank, with a text for the log. True if all ranks stop.
Between = Callable[[str], bool]


def evaluation_batch(image_size: int) -> int:
    """Return the number of test images in a batch: 500 of 32x32 pixels, fewer of larger ones."""
    return min(500, max(1, _PIXELS // image_size**2))


def evaluated_kind(spec: Spec) -> str:
    """Name the weights that a run evaluates, which `Engine.evaluated_weights` has: averaged, slow or fast."""
    if spec.ema.decay is not None:
        return "averaged"
    return "slow" if spec.lookahead.enabled else "fast"


def measures_statistics(spec: Spec) -> bool:
    """Return whether any evaluation of a run measures BatchNorm statistics."""
    return spec.lookahead.bn_batches > 0 and (evaluated_kind(spec) != "fast" or resizes(spec))


@dataclass(frozen=True)
class Result:
    """Mean test loss (label smoothing as in training), test accuracy in %, and the BatchNorm buffers used for them."""

    loss: float
    accuracy: float
    buffers: dict[str, Tensor]


def evaluate(engine: Engine, epoch: int, between: Between) -> Result | None:
    """Evaluate `engine.evaluated_weights` on the test set. Collective.

    BatchNorm statistics are valid for the weights and the image size they were measured with. The running ones follow
    the fast weights on training's images. For averaged or slow weights, and where training's images are smaller
    (resizing), statistics are therefore estimated over lookahead.bn_batches training batches, augmented as in training
    but in full size and not mixed, without dropout (Izmailov et al. 2018, arXiv:1803.05407, section 3.2). Afterwards
    the running ones are restored.

    Returns:
        The result, or None if `between` returned true.
    """
    engine.share_buffers()
    with torch.no_grad(), engine.evaluated_weights(), restored(list(engine.model.buffers())):
        foreign = evaluated_kind(engine.spec) != "fast" or training_size(engine.spec, epoch) < engine.spec.data.size
        if foreign and engine.spec.lookahead.bn_batches > 0 and not _estimate_statistics(engine, epoch, between):
            return None
        engine.model.eval()
        sums = _test_sums(engine, between)
        if sums is None:
            return None
        loss, correct = (float(v) for v in sums)
        buffers = {name: buffer.detach().cpu().clone() for name, buffer in engine.buffers().items()}
    count = len(engine.data.test_images)
    return Result(loss / count, 100 * correct / count, buffers)


def _estimate_statistics(engine: Engine, epoch: int, between: Between) -> bool:
    """Set the running statistics to the mean over shards of training batches. False if `between` returned true.

    A shard fits into memory, since training runs its forward and backward pass; a whole batch may not.
    """
    spec, layout = engine.spec, engine.layout
    size = min(spec.train.batch_size, len(engine.data.train_images))
    batches = min(spec.lookahead.bn_batches, len(engine.data.train_images) // size)
    rows = permutation(mix(spec.train.seed, Stream.BN_ESTIMATE), epoch, len(engine.data.train_images)).to(engine.device)
    engine.model.train()  # where a network keeps some layers in evaluation mode, these stay as they are
    norms = [n for n in engine.exact.norms if n.training and n.running_mean is not None]
    running = [b for n in norms for b in n.buffers() if b.is_floating_point()]  # mean and variance of each
    if not running:
        return True
    count = batches * layout.shards
    table = torch.zeros(count, sum(len(b) for b in running), device=engine.device)
    engine.model.eval()
    momenta = [n.momentum for n in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the running statistics become those of the shard
    engine.exact.set_update_statistics(True)
    try:
        for first in range(0, count, layout.world_size):
            if (number := first + layout.rank) < count:
                batch, shard = divmod(number, layout.shards)
                indices = rows[batch * size : (batch + 1) * size][layout.bounds(shard, size)]
                images = engine.augmented(indices, mix(spec.train.seed, Stream.BN_ESTIMATE, epoch, batch))
                with engine.autocast():
                    engine.model(images)
                table[number] = torch.cat(running)
            done = min(first + layout.world_size, count) // layout.shards
            if between(f"epoch {epoch + 1}: measuring BatchNorm statistics, batch {done}/{batches}"):
                return False
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if layout.world_size > 1:
        dist.all_reduce(table)  # each row is zero on every rank but one: exact
    means = table.double().mean(0).float().split([len(b) for b in running])
    torch._foreach_copy_(running, means)
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(batches)  # this rank has seen only its own
    return True


def _test_sums(engine: Engine, between: Between) -> Tensor | None:
    """Return the summed loss and correct predictions over the test set, float64 [2] on the host; None after a stop."""
    images, labels, layout = engine.data.test_images, engine.data.test_labels, engine.layout
    size = evaluation_batch(engine.data.info.image_size)
    batches = -(-len(images) // size)
    table = torch.zeros(batches, 2, dtype=torch.float64, device=engine.device)
    for first in range(0, batches, layout.world_size):
        batch = first + layout.rank
        if batch < batches:
            rows = slice(batch * size, (batch + 1) * size)
            pixels = normalize(images[rows], engine.data.info)
            with engine.autocast():
                logits = engine.model(pixels)
            table[batch, 0] = engine.loss_sum(logits, labels[rows])
            table[batch, 1] = (logits.argmax(1) == labels[rows]).sum()
        if between(f"evaluating: {min(len(images), (first + layout.world_size) * size)}/{len(images)} test images"):
            return None
    if layout.world_size > 1:
        dist.all_reduce(table)
    return table.cpu().sum(0)
