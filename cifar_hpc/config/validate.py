"""Checks that the values of a spec fit together."""

from __future__ import annotations

import re

from cifar_hpc.config.spec import IMAGE_SIZE, ModelSpec, ResizingSpec, Spec
from cifar_hpc.errors import SpecError
from cifar_hpc.slurm.options import check_dependency, check_option_names, parse_time
from cifar_hpc.text import shown

# Of a layer that another one follows, whose 1x1 convolution of stride 2 then has 4 x this many channels. With fewer
# than 16 oneDNN writes past its memory on a CPU (https://github.com/uxlfoundation/oneDNN/issues/6035).
LEAST_WIDTH = 4


def check(spec: Spec) -> Spec:
    """Return `spec` if its values fit together.

    Raises:
        SpecError: names the dotted keys that contradict each other.
    """
    train, model, checkpoint = spec.train, spec.model, spec.checkpoint
    if len(model.blocks) != len(model.widths):
        raise SpecError(
            f"model.blocks: {list(model.blocks)} has {len(model.blocks)} layers but model.widths "
            f"{list(model.widths)} has {len(model.widths)}; allowed: lists of one length."
        )
    _check_layers(model, spec.resizing)
    if train.shards is not None and train.shards > train.batch_size:
        raise SpecError(
            f"train.shards: {train.shards} is not allowed; allowed: at most train.batch_size "
            f"({train.batch_size}), since each shard needs an image of each batch."
        )
    paces = {
        f"checkpoint.{key}": value
        for key in ("every", "every_minutes", "every_steps")
        if (value := getattr(checkpoint, key)) is not None
    }
    if len(paces) > 1:
        given = " and ".join(
            f"{key}: {value:g}" if isinstance(value, float) else f"{key}: {value}" for key, value in paces.items()
        )
        raise SpecError(
            f"{given} are given together; allowed: one of them. HINT: --set {next(iter(paces))}=null takes one away."
        )
    if train.compile and train.deterministic:
        raise SpecError(
            "train.compile: true needs train.deterministic: false, since what is compiled when depends on the history "
            "of restarts and the number of processes; such a run resumes exactly, but not to the same bits."
        )
    check_option_names(spec.resources.sbatch)
    check_dependency(spec.resources.dependency)
    if spec.optimizer.nesterov and spec.optimizer.momentum == 0:
        raise SpecError("optimizer.nesterov: true needs optimizer.momentum > 0, which is 0.")
    if spec.schedule.warmup_epochs >= train.epochs:
        raise SpecError(
            f"schedule.warmup_epochs: {spec.schedule.warmup_epochs:g} is not allowed; allowed: less than train.epochs "
            f"({train.epochs})."
        )
    if spec.resizing.delay + spec.resizing.finetune > 1:
        raise SpecError(
            f"resizing.delay: {spec.resizing.delay:g} and resizing.finetune: {spec.resizing.finetune:g} are more than "
            "all epochs; allowed: a sum of at most 1."
        )
    if spec.data.holdout is not None and spec.data.test_size is not None:
        raise SpecError(
            "data.holdout and data.test_size are given together; allowed: one of them, since the images that are "
            "held out take the place of the test images."
        )
    _check_device(train.device)
    parse_time(spec.resources.time, "resources.time")
    _check_nodes(spec.resources.nodes)
    return spec


def _check_layers(model: ModelSpec, resizing: ResizingSpec) -> None:
    smallest = resizing.initial or IMAGE_SIZE
    most = (smallest - 1).bit_length()
    if len(model.widths) > most:
        # BatchNorm has no variance over a single pixel of a single image, which a shard's last batch may be.
        raise SpecError(
            f"model.widths: {len(model.widths)} layers are not allowed; allowed: at most {most}, since each layer "
            f"after the first halves images of {smallest}x{smallest} pixels, and one pixel is too few."
            + (" HINT: give resizing.initial more pixels." if smallest < IMAGE_SIZE else "")
        )
    narrow = [w for w in model.widths[:-1] if model.scaled(w) < LEAST_WIDTH]
    if narrow:
        raise SpecError(
            f"model.widths: {narrow[0]} with model.width_multiplier: {model.width_multiplier:g} makes a layer of width "
            f"{model.scaled(narrow[0])}; allowed: at least {LEAST_WIDTH} in every layer but the last."
        )


def _check_device(device: str) -> None:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device) is None:
        raise SpecError(f"train.device: {shown(device)} is not allowed; allowed: auto, cuda, cuda:N, cpu.")


def _check_nodes(nodes: str) -> None:
    numbers = [int(n) for n in nodes.split("-")] if re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?", nodes) else [0]
    if not 1 <= numbers[0] <= numbers[-1]:
        raise SpecError(f"resources.nodes: {shown(nodes)} is not allowed; allowed: N or MIN-MAX, such as 2 or 1-4.")
