"""Rules between the keys of a spec: what must fit together."""

import re

from cifar_hpc.config.spec import LEAST_WIDTH, OPTIMIZERS, TARGET_KEYS, DataSpec, ModelSpec, OptimizerSpec, Spec
from cifar_hpc.config.user_code import check_target
from cifar_hpc.errors import SpecError
from cifar_hpc.slurm.options import check_dependency, check_option_names, node_counts, parse_time
from cifar_hpc.text import shown


def check(spec: Spec) -> Spec:
    """Return `spec` if its values fit together.

    Raises:
        SpecError: names the dotted keys that contradict each other.
    """
    train, model, checkpoint, size = spec.train, spec.model, spec.checkpoint, spec.data.size
    if len(model.blocks) != len(model.widths):
        raise SpecError(
            f"model.blocks: {list(model.blocks)} has {len(model.blocks)} layers but model.widths "
            f"{list(model.widths)} has {len(model.widths)}; allowed: lists of one length."
        )
    if model.target is None:
        _check_layers(model, spec.resizing.initial or size)
    else:
        check_target(model.target, "model.target")
        own = {key: value for key, value in vars(ModelSpec()).items() if key not in TARGET_KEYS}
        for key in (key for key, value in own.items() if getattr(model, key) != value):
            raise SpecError(f"model.{key}: has no effect with model.target. HINT: model.args are its arguments.")
    if spec.data.target is not None:
        check_target(spec.data.target, "data.target")
        if spec.data.source != DataSpec().source:
            raise SpecError(f"data.source: {spec.data.source} has no effect with data.target. HINT: leave one out.")
    for section in (model, spec.data):
        if section.args and section.target is None:
            name = "model" if section is model else "data"
            raise SpecError(f"{name}.args: has no effect without {name}.target.")
    if train.shards is not None and train.shards > train.batch_size:
        raise SpecError(
            f"train.shards: {train.shards} is not allowed; allowed: at most train.batch_size "
            f"({train.batch_size}), since each shard needs an image of each batch."
        )
    paces = [k for k in ("every", "every_minutes", "every_steps") if getattr(checkpoint, k) is not None]
    if len(paces) > 1:
        given = " and ".join(f"checkpoint.{key}: {str(getattr(checkpoint, key)).removesuffix('.0')}" for key in paces)
        raise SpecError(
            f"{given} are given together; allowed: one of them. HINT: --set checkpoint.{paces[0]}=null takes one away."
        )
    if train.compile and train.deterministic:
        raise SpecError(
            "train.compile: true needs train.deterministic: false, since what is compiled when depends on the history "
            "of restarts and the number of ranks; such a run resumes exactly, but not to the same bits."
        )
    if train.graph == "on" and (train.compile or train.amp == "fp16"):
        other = "train.compile: true" if train.compile else "train.amp: fp16"
        raise SpecError(f"train.graph: on does not go with {other}. HINT: train.graph: off.")
    check_option_names(spec.resources.sbatch)
    check_dependency(spec.resources.dependency)
    for name, (_, options) in OPTIMIZERS.items():
        for key in options if name != spec.optimizer.name else ():
            if getattr(spec.optimizer, key) != getattr(OptimizerSpec(), key):
                raise SpecError(
                    f"optimizer.{key}: has no effect with optimizer.name: {spec.optimizer.name}; it is {name}'s."
                )
    if spec.optimizer.name == "sgd" and spec.optimizer.nesterov and spec.optimizer.momentum == 0:
        raise SpecError("optimizer.nesterov: true needs optimizer.momentum > 0, which is 0.")
    warmup, epochs = spec.schedule.warmup_epochs, train.epochs
    if warmup >= epochs:
        raise SpecError(
            f"schedule.warmup_epochs: {warmup:g} is not allowed; allowed: less than train.epochs ({epochs})."
        )
    for name in ("erasing_scale", "erasing_ratio"):
        first, last = getattr(spec.augment, name)
        if first > last:
            raise SpecError(f"augment.{name}: [{first:g}, {last:g}] is not allowed; allowed: the smaller first.")
    for key, value, most in (
        ("resizing.initial", spec.resizing.initial or 0, size),
        ("resizing.increment", spec.resizing.increment, size),
        ("augment.crop_padding", spec.augment.crop_padding, size - 1),
    ):
        if value > most:
            raise SpecError(f"{key}: {value} is not allowed; allowed: at most {most}, by data.image_size ({size}).")
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
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", train.device) is None:
        raise SpecError(f"train.device: {shown(train.device)} is not allowed; allowed: auto, cuda, cuda:N, cpu.")
    parse_time(spec.resources.time, "resources.time")
    node_counts(spec.resources.nodes)
    gpus = spec.resources.gpus_per_node
    if (
        isinstance(gpus, str)
        and re.fullmatch("(?=.*[A-Za-z])[A-Za-z0-9_.+-]+:([0-9]{1,3}|[1-3][0-9]{3})", gpus) is None
    ):
        raise SpecError(
            f"resources.gpus_per_node: {shown(gpus)} is not allowed; allowed: an integer >= 0 and <= 4096, or one with "
            "a type of GPU before it, such as a100:4. A list of types is not, since all ranks of a run are alike."
        )
    return spec


def _check_layers(model: ModelSpec, smallest: int) -> None:
    most = (smallest - 1).bit_length()
    if len(model.widths) > most:
        # BatchNorm has no variance over a single pixel of a single image, which a shard's last batch may be.
        raise SpecError(
            f"model.widths: {len(model.widths)} layers are not allowed; allowed: at most {most}, since each layer "
            f"after the first halves images of {smallest}x{smallest} pixels, and one pixel is too few."
            " HINT: resizing.initial, or else data.image_size, gives them more."
        )
    narrow = [w for w in model.widths[:-1] if model.scaled(w) < LEAST_WIDTH]
    if narrow:
        raise SpecError(
            f"model.widths: {narrow[0]} with model.width_multiplier: {model.width_multiplier:g} makes a layer of width "
            f"{model.scaled(narrow[0])}; allowed: at least {LEAST_WIDTH} in every layer but the last."
        )
