"""A trained model, ready to use: weights and the BatchNorm statistics that belong to them, from a checkpoint.

A checkpoint at an epoch's end holds the statistics of the weights that the epoch's evaluation took; one in the middle
of an epoch has only those of the fast weights. For the evaluated weights, therefore, the newest checkpoint at an
epoch's end is taken. Statistics are never measured again: that would give a model whose figures are in no log."""

import contextlib
import dataclasses
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.pipeline import normalize
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.data.sources import class_names
from cifar_hpc.errors import RunFailedError, SpecError, UserError
from cifar_hpc.models.network import build_network, put, to_channels_last
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths, find_run, is_run_name
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.text import printable, shown
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.store import BEST, candidates, newest_good
from cifar_hpc.training.environment import configure_torch, describe_environment, resolve_amp
from cifar_hpc.training.evaluation import evaluated_kind, evaluation_batch, measures_statistics

_LOGGED = ("epoch", "test_accuracy", "test_loss")


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and where it comes from.

    Attributes:
        run: None for a file that lies in no run's folder.
        info: classes, size, mean and deviation of the images that it was trained on.
        weights: averaged | slow | fast: which of the checkpoint's weights these are.
        logged: epoch, test_accuracy and test_loss of the run's own evaluation of exactly this model, if there was one.
        device, amp: where and in what precision `logits` computes.
        code: folder of the run's copies of user files.
        environment: of the device, as `describe_environment` gives it.
        notes: sentences that a user should know.
    """

    path: Path
    run: str | None
    state: TrainingState
    spec: Spec
    model: nn.Module
    info: DatasetInfo
    weights: str
    logged: Mapping[str, Any] | None
    device: torch.device
    amp: str
    environment: Mapping[str, Any]
    code: Path
    notes: tuple[str, ...]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [B, 10] on the device, for uint8 [B, 3, S, S]; the same bits as in the run's own evaluation.

        Raises:
            RunFailedError: they are NaN or infinite.
        """
        pixels = normalize(images.to(self.device), self.info)
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.amp != "fp32"):
            logits: Tensor = self.model(pixels)
        if not logits.isfinite().all():
            raise RunFailedError(
                f"{self.path}: the model's outputs in {self.amp} are NaN or infinite. HINT: another checkpoint of the "
                "run, or --weights."
            )
        return logits.float()

    def facts(self, root: Path) -> dict[str, str]:
        """The first lines of a command's summary, as pairs of words."""
        state, path, here = self.state, self.path, self.environment
        kind = {"averaged": "averaged (ema)"}.get(self.weights, self.weights)
        within = f", step {state.step_in_epoch} of the next" if state.step_in_epoch else ""
        threads = f", {here['threads']} thread{'s' * (here['threads'] > 1)}" if here["threads"] else ""
        return {
            "run": self.run or "-",
            "checkpoint": str(path.relative_to(root) if path.is_relative_to(root) else path),
            "position": f"step {state.step}, epoch {state.epoch} of {self.spec.train.epochs}{within}",
            "weights": kind if kind == "fast" else f"{kind}, as the run evaluates",
            "computed": f"{self.amp} on {here['device']}{threads}",
        }


def summary(facts: Mapping[str, str], body: Iterable[str], notes: Iterable[str], written: Iterable[str]) -> str:
    """The text that a command prints: facts in two columns, its own lines, notes, and the files written."""
    lines = [f"{key:11} {value}" for key, value in facts.items()]
    return printable("\n".join([*lines, *body, *noted(notes), *written]))


def noted(notes: Iterable[str]) -> list[str]:
    """Notes as lines of 80 columns."""
    return [
        line
        for note in notes
        for line in textwrap.wrap(f"note: {note}", 80, subsequent_indent="      ", break_on_hyphens=False)
    ]


def dataset_info(run: RunPaths, spec: Spec) -> DatasetInfo:
    """Facts of the images of a run: those in its newest checkpoint, else by its spec."""
    for path in candidates(run.checkpoints):
        with contextlib.suppress(UserError, BadFileError, OSError):
            if info := read_checkpoint(path).info:
                return info
    return DatasetInfo(class_names(spec.data, run.root), spec.data.size)


def load_trained(root: Path, run: str, weights: str) -> TrainedModel:
    """The model of a run, or of a checkpoint file.

    Args:
        root: the project's root.
        run: a run's name, or the path of a file.
        weights: fast, or slow for those that the run itself evaluates: the averaged ones under ema.decay, and the fast
            ones where the run has neither that nor Lookahead.

    Raises:
        SpecError: there is no such run, file or checkpoint, or it lacks the weights' BatchNorm statistics.
        RunFailedError: a checkpoint does not verify, or holds weights that are not finite.
    """
    fast = weights == "fast"
    path, state, notes = _find(root, run, fast)
    spec = from_plain(state.spec)
    evaluated = evaluated_kind(spec)
    kind = "fast" if fast else evaluated
    row = state.rows[-1] if kind == evaluated and state.slow_buffers is not None and state.rows else {}
    whole = all(isinstance(row.get(key), (int, float)) for key in _LOGGED)
    logged = {key: row[key] for key in _LOGGED} if whole else None
    if evaluated == "fast":
        notes.append("The run has neither Lookahead nor ema: it has but one set of weights.")
    own = state.environment
    device = torch.device("cuda" if spec.train.device != "cpu" and torch.cuda.is_available() else "cpu")
    here, amp = spec, own["amp"]
    if (own["cuda"] is not None) != (device.type == "cuda"):
        # The bits cannot be kept, so this machine's own precision and all its cores are used.
        amp = resolve_amp(spec, device)
        threads = len(os.sched_getaffinity(0))
        here = dataclasses.replace(spec, train=dataclasses.replace(spec.train, cpu_threads=threads))
        notes.append(f"The run computed in {own['amp']} on {own['device']}: figures may differ in their last digits.")
    configure_torch(here, device)
    info = state.info or DatasetInfo(class_names(spec.data, root), spec.data.size)
    model = _build(path, spec, info, state, kind, state.buffers if fast else state.slow_buffers or state.buffers)
    model = to_channels_last(model.to(device)).eval()
    name = path.parent.name
    known = name if is_run_name(name) and path.parent.parent.name == "checkpoints" else None
    environment = describe_environment(here, device)
    return TrainedModel(
        path,
        known,
        state,
        spec,
        model,
        info,
        kind,
        logged,
        device,
        amp,
        environment,
        _code_of(path, spec),
        tuple(notes),
    )


def _usable(state: TrainingState, fast: bool) -> bool:
    """True if the checkpoint has the BatchNorm statistics of the requested weights."""
    return fast or not measures_statistics(from_plain(state.spec)) or state.slow_buffers is not None


def _find(root: Path, run: str, fast: bool) -> tuple[Path, TrainingState, list[str]]:
    """Path and state of the newest usable checkpoint, or of the given file, and notes for the user."""
    if run.endswith(".pt") or "/" in run:
        path = Path(run).absolute()
        if not os.path.lexists(path):
            raise SpecError(f"{path}: there is no such file.")
        state = _read(path)
        if not _usable(state, fast):
            raise SpecError(
                f"{path}: was written in the middle of an epoch, without the BatchNorm statistics of the weights that "
                "the run evaluates. HINT: --weights fast, or a checkpoint of an epoch's end, such as best.pt."
            )
        return path, state, []
    directory = find_run(root, run).checkpoints
    found = newest_good(directory)
    if found is None:
        raise SpecError(f"run {run} has no checkpoint in {directory} yet. HINT: show {run} says how it is.")
    notes = [f"{path.name} is newer, but does not verify: {reason}." for path, reason in found.bad]
    if _usable(found.state, fast):
        return found.path, found.state, notes
    best: tuple[Path, TrainingState] | None = None
    for path in [*candidates(directory), directory / BEST]:
        with contextlib.suppress(UserError):
            state = _read(path)
            if _usable(state, fast) and (best is None or state.step > best[1].step):
                best = path, state
    if best is None:
        raise SpecError(
            f"run {run} has no checkpoint of an epoch's end yet, and those within an epoch lack the BatchNorm "
            "statistics of the weights that it evaluates. HINT: wait for its first epoch, or --weights fast."
        )
    notes.append(
        f"{found.path.name} is newer, but within an epoch, without BatchNorm statistics of the evaluated weights."
    )
    return *best, notes


def _read(path: Path) -> TrainingState:
    try:
        return read_checkpoint(path)
    except BadFileError as error:
        raise RunFailedError(f"{path}: {error}. Allowed: a run's name, or a checkpoint that a run wrote.") from None


def _build(
    path: Path, spec: Spec, info: DatasetInfo, state: TrainingState, kind: str, buffers: Mapping[str, Any]
) -> nn.Module:
    """The model with weights of that kind and the given BatchNorm statistics."""
    weights = state.weights(kind)
    model = build_network(spec.model, info, spec.train.seed, _code_of(path, spec))
    try:
        put(model, {**weights, **buffers})
    except ValueError as error:
        raise RunFailedError(f"{path}: is not of {spec.model.target}: {error}") from None
    layers = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    learned = [*model.parameters(), *(buffer for layer in layers for buffer in layer.buffers())]
    if not all(tensor.isfinite().all() for tensor in learned):  # a buffer may hold a mask of -inf
        raise RunFailedError(f"{path}: its {kind} weights or their BatchNorm statistics are NaN or infinite.")
    return model


def _code_of(path: Path, spec: Spec) -> Path:
    """Folder of the copies of user files that belong to a checkpoint. Code that a file names by itself is never run.

    Raises:
        SpecError: the file does not lie with a run that was submitted here under the same target.
    """
    paths = RunPaths(path.parents[min(2, len(path.parents) - 1)], path.parent.name)
    target = spec.model.target
    if target is None or target.startswith("torchvision.models:"):
        return paths.user_code
    own = read_frozen(paths) if path.parent == paths.checkpoints else None
    if own is None or own.model != spec.model:
        raise SpecError(
            f"{path}: its network, {shown(target)}, is code of its own, which is run only for a checkpoint in "
            "checkpoints/RUN of a run whose logs/RUN/spec.yaml names it. HINT: keep both folders of the run together."
        )
    return paths.user_code


SAY_SECONDS = 10.0


def batches(
    trained: TrainedModel, read: Callable[[int, int], Tensor], count: int, what: str
) -> Iterator[tuple[int, Tensor]]:
    """Logits of the images 0 to `count`, in the batches of the trainer's evaluation: (index of the first, logits).

    Prints its progress to standard error every SAY_SECONDS.

    Args:
        read: gives the images from one index up to another, uint8 [n, 3, 32, 32].
        what: the first word of the progress line.
    """
    said = time.monotonic()
    size = evaluation_batch(trained.info.image_size)
    for first in range(0, count, size):
        yield first, trained.logits(read(first, min(first + size, count)))
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            print(f"{what}: {min(first + size, count):,} of {count:,} images", file=sys.stderr, flush=True)
            said = now
