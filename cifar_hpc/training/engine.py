"""Model, optimizer and sums of one rank, and the training step."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cifar_hpc.config.io import HERE
from cifar_hpc.config.schedule import learning_rate, training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.kernels import DRAWS
from cifar_hpc.data.augment.mixing import Mixed, mix_batch, mixed_correct, mixed_loss, resize
from cifar_hpc.data.augment.pipeline import augment, normalize
from cifar_hpc.data.augment.trivial import TRIVIAL_DRAWS, trivial_augment
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.errors import RunFailedError
from cifar_hpc.models.exact import make_exact
from cifar_hpc.models.network import build_network, cast, castable, put, to_channels_last
from cifar_hpc.randomness import Stream, mix_each, uniform
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.checkpoints.format import TrainingState
from cifar_hpc.training.distributed.shards import ShardLayout, ShardReducer
from cifar_hpc.training.graph import StepGraphs, capturable
from cifar_hpc.training.inputs import InputQueue, StepInputs
from cifar_hpc.training.network_check import check_gradients, check_network
from cifar_hpc.training.optim import (
    Lookahead,
    WeightAverage,
    build_optimizer,
    load_plain_state,
    plain_state,
    set_rate,
)

NO_BAD_STEP = 2**62
BUCKET_MB: float = 4  # the built-in network's five buckets are sent during the backward pass; DDP's own 25 make two
# GradScaler starts at 2**16 and halves at an overflow. Only gradients that are NaN at any scale get it down to here.
LEAST_SCALE = 2.0**-24


class Engine:
    """The part of the training state that one rank computes with.

    Args:
        spec: resolved, so train.shards is a number.
        device: of this rank.
        layout: the shards of this rank.
        data: on `device`.
        amp: bf16 | fp16 | fp32.
        code: folder of the run's copies of user files.

    Attributes:
        exact: the layers of the network that give the same bits for any number of ranks.
        sums: float64 [shards, 2], this epoch's summed loss and correct predictions; zero for other ranks' shards.
        bad_step: int64 [], the first step whose loss was NaN or infinite.
        rate: learning rate of the last update.
        graphs: CUDA graphs of steps; None where all steps are eager.
    """

    def __init__(
        self, spec: Spec, device: torch.device, layout: ShardLayout, data: Dataset, amp: str, code: Path = HERE
    ) -> None:
        self.spec, self.device, self.layout, self.data, self.amp, self.code = spec, device, layout, data, amp, code
        batch, images = spec.train.batch_size, len(data.train_images)
        rest = images % batch
        # A last batch with fewer images than shards is left out.
        self.steps_per_epoch = images // batch + (1 if rest >= layout.shards else 0)
        if self.steps_per_epoch == 0:
            raise RunFailedError(f"the {images} training images do not give each of the {layout.shards} shards one.")
        self.images_per_epoch = min(images, self.steps_per_epoch * batch)
        last = rest if layout.shards <= rest else batch
        self._fewest_images = min(last, batch) // layout.shards  # of a shard, in any step

        network = build_network(spec.model, data.info, spec.train.seed, code)
        self.exact = make_exact(network)
        self.model = to_channels_last(network.to(device))
        # Of the user's own network, which may leave one out in some steps: its name, and the parameter.
        named = self.model.named_parameters() if spec.model.target is not None else ()
        self._own_trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if spec.train.compile:
            self.model.compile()
        self.ddp: DistributedDataParallel | None = None
        self.reducer: ShardReducer | None = None
        if layout.world_size > 1:
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=BUCKET_MB,
                gradient_as_bucket_view=True,  # no copies from buckets back to gradients
            )
            self.ddp.broadcast_buffers = False  # newer versions of PyTorch have another name for it as an argument
            self.reducer = ShardReducer(self.ddp, layout)

        # At once, rather than one by one; DDP would have to wait for all gradients.
        at_once = amp == "bf16" and spec.model.target is None and layout.world_size == 1 and not spec.train.compile
        self._castable = castable(self.model) if at_once else []
        self.updates, self.rate = 0, spec.optimizer.lr
        fused = capturable(device, amp)
        self.optimizer = build_optimizer(self.model, spec, fused)
        getattr(self.optimizer, "inner", self.optimizer).register_step_post_hook(self._count_update)
        decay = spec.ema.decay
        self.average = WeightAverage(list(self.model.parameters()), decay, fused) if decay is not None else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.sums = torch.zeros(layout.shards, 2, dtype=torch.float64, device=device)
        self.bad_step = torch.full((), NO_BAD_STEP, dtype=torch.int64, device=device)
        self._inputs = InputQueue(spec, layout, data, self.augmented, self.exact.keys)
        # With several ranks the steps are eager, and have the same bits.
        whole = fused and layout.world_size == 1
        self.graphs = StepGraphs(self) if whole and spec.train.graph == "on" else None

    def _count_update(self, *_: object) -> None:
        self.updates += 1  # GradScaler skips step() at an overflow, so skipped steps do not count

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the run's precision; for fp32 an empty one."""
        if self.amp == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.amp == "bf16" else torch.float16)

    def step(self, epoch: int, step_in_epoch: int, global_step: int, order: Tensor) -> None:
        """Make one update from a global batch.

        Args:
            order: int64 [N] on the device, the order of the training images in this epoch.
        """
        inputs = self._inputs.take(epoch, step_in_epoch, global_step, order)
        self.rate = learning_rate(self.spec, epoch, self.updates, self.steps_per_epoch)
        set_rate(self.optimizer, self.rate)
        if self.average is not None:
            self.average.set_weight(self.updates + 1)
        if not self.model.training:
            self.model.train()
        side = training_size(self.spec, epoch)
        if self.graphs is None:
            self.compute(inputs, side)
        else:
            self.graphs.step(inputs, side)

    def compute(self, inputs: StepInputs, side: int) -> None:
        """Do all of a step that a CUDA graph may hold: it starts the same operations with the same numbers each time.

        Args:
            side: height and width of the images to train on, in pixels.
        """
        self.optimizer.zero_grad(set_to_none=True)
        mine = self.layout.mine
        for shard in mine:
            kept = self.reducer is not None and shard != mine[-1]
            context = self.ddp.no_sync() if self.ddp is not None and kept else contextlib.nullcontext()
            with context:
                self._shard_gradient(inputs, shard, side)
            if self.reducer is not None and kept:
                self.reducer.keep()
        if self.reducer is not None:
            self.reducer.end_step()
        before = self.updates
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.updates > before:
            self.average.update()

    def _shard_gradient(self, inputs: StepInputs, shard: int, side: int) -> None:
        smoothing, mine = self.spec.train.label_smoothing, self.layout.mine
        first = self.layout.bounds(mine[0], inputs.batch).start
        bounds = self.layout.bounds(shard, inputs.batch)
        rows = slice(bounds.start - first, bounds.stop - first)
        images, labels = inputs.images[rows], inputs.labels[rows]
        mixed: Mixed | None = None
        if inputs.draws is not None:  # with images of the same shard, so that no rank needs those of another
            mixed = mix_batch(images, labels, inputs.draws[rows], self.spec.mixing)
            images = mixed.images
        images = resize(images, side)
        if images.storage_offset() % 16:  # libraries choose kernels by alignment, which must not depend on the place
            images = images.clone()
        self.exact.set_key(inputs.keys[shard - mine[0]], self.device)
        self.exact.set_update_statistics(shard == 0)
        with self.autocast(), cast(self._castable, torch.bfloat16) if self._castable else contextlib.nullcontext():
            logits = (self.ddp or self.model)(images)
        self.exact.count_batches()
        loss = self.loss_sum(logits, labels) if mixed is None else mixed_loss(logits, mixed, smoothing)
        self.scaler.scale(loss / inputs.batch).backward()
        if any(parameter.grad is None for _, parameter in self._own_trainable):
            names = [name for name, parameter in self._own_trainable if parameter.grad is None]
            raise RunFailedError(
                f"model.target: {', '.join(names[:3])} got no gradient in step {int(inputs.number)}. HINT: each "
                "trainable parameter must take part in each forward pass; multiply by 0 in place of leaving it out."
            )
        with torch.no_grad():
            bad = (loss - loss).ne(0)  # NaN or infinite, in half of isfinite's operations
            right = (logits.argmax(1) == labels).sum() if mixed is None else mixed_correct(logits, mixed)
            # GradScaler handles an overflow under fp16; it must not spoil the epoch's sum.
            self.sums[shard, 0].add_(loss.masked_fill(bad, 0))
            self.sums[shard, 1].add_(right)
            if self.amp != "fp16":
                number = torch.where(bad, inputs.number, NO_BAD_STEP)
                torch.minimum(self.bad_step, number, out=self.bad_step)

    def augmented(self, indices: Tensor, key: int | Tensor) -> Tensor:
        """Return augmented, normalised training images [B, 3, S, S], channels_last.

        Args:
            indices: int64 [B].
            key: of all of them, or of each, int64 [B].
        """
        if isinstance(key, int):
            key = torch.full((1,), key, dtype=torch.int64, device=self.device)
        draws = uniform(key, indices, DRAWS)
        images = self.data.train_images.index_select(0, indices)  # [indices] takes 20 times as long on a CPU
        if self.spec.augment.trivial:
            images = trivial_augment(images, uniform(mix_each(key, Stream.TRIVIAL), indices, TRIVIAL_DRAWS))
        return augment(images, draws, self.spec.augment, self.data.info)

    def first_gradient(self) -> str | None:
        """Return a digest of the gradient of two training images: equal where the kernels compute the same bits.

        Only under the initial weights, which are the same in every attempt. None if the bits may change anyway.

        Raises:
            RunFailedError: the user's network would not give the same bits.
        """
        own = bool(self._own_trainable)
        if not (own or self.spec.train.deterministic):
            return None
        count = min(2, self._fewest_images) if own else 2
        images, labels = normalize(self.data.train_images[:count], self.data.info), self.data.train_labels[:count]
        self.model.train()
        self.exact.set_key(0, self.device)
        self.exact.set_update_statistics(False)
        # Not compiled: that would take long for this batch size.
        eager = torch.compiler.set_stance("force_eager") if self.spec.train.compile else contextlib.nullcontext()
        stream = self.graphs.stream() if self.graphs is not None else contextlib.nullcontext()
        with stream:
            with self.autocast(), eager:
                if own:
                    logits = check_network(self.model, self.exact, images, len(self.data.info.classes), self.code)
                else:
                    logits = self.model.forward(images)
            loss = self.loss_sum(logits, labels)
            if own:
                gradients = check_gradients(self.model, loss, self.exact, self.code)
            else:
                gradients = list(torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad]))
        return digest(gradients)[:16] if self.spec.train.deterministic else None

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy with label smoothing, in float32."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.spec.train.label_smoothing, reduction="sum")

    def bad_loss(self) -> str | None:
        """Describe a NaN or infinite loss on this rank; None if there is none. Waits for the device.

        A single overflow under fp16 is no fault: there the loss scale shows whether any step still updates the weights.
        """
        step = int(self.bad_step)
        if step < NO_BAD_STEP:
            epoch = (step - 1) // self.steps_per_epoch + 1
            return f"the training loss was NaN or infinite at step {step}, in epoch {epoch}"
        if self.amp == "fp16" and (scale := self.scaler.get_scale()) < LEAST_SCALE:
            return f"fp16: the gradients overflow at every loss scale (now {scale:g}), so no step updates the weights"
        return None

    def check_finite(self) -> None:
        """Check the losses and weights of all ranks. Collective; waits for the device.

        Raises:
            RunFailedError: on every rank, if any loss or weight is NaN or infinite.
        """
        if self.layout.world_size > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        problem = self.bad_loss()
        # A step with a finite loss may leave weights that are not finite; their checkpoint would not be a good one.
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if problem is None and not torch.stack(norms).isfinite().all():
            problem = f"the weights became NaN or infinite by update {self.updates}"
        if problem is not None:
            hint = "HINT: lower optimizer.lr, or set train.amp=fp32."
            error = RunFailedError(f"{problem}. Any earlier checkpoints are kept. {hint}")
            error.everywhere = True  # all ranks have the same bad step and the same weights
            raise error

    def epoch_sums(self) -> Tensor:
        """Return this epoch's sums of all shards, float64 [shards, 2] on the host. Collective."""
        sums = self.sums.clone()
        if self.layout.world_size > 1:
            dist.all_reduce(sums)  # in each row all ranks but one have zeros: exact, in any order
        return sums.cpu()

    def loss_so_far(self, images: int) -> tuple[float, float]:
        """Return (mean loss, accuracy in %) of this rank's shards after `images` images of the epoch.

        Waits for the device.
        """
        share = max(1.0, images * len(self.layout.mine) / self.layout.shards)
        loss, correct = self.sums.sum(0).tolist()
        return loss / share, 100 * correct / share

    def evaluated_weights(self) -> contextlib.AbstractContextManager[object]:
        """Put the weights to evaluate into the model for the context: their average, else the slow or the only ones."""
        if self.average is not None:
            return self.average.averaged_weights()
        return self.optimizer.slow_weights() if isinstance(self.optimizer, Lookahead) else contextlib.nullcontext()

    def buffers(self) -> dict[str, Tensor]:
        """Return BatchNorm's running statistics, on rank 0 those of shard 0."""
        return dict(self.model.named_buffers())

    def state(self) -> dict[str, Any]:
        """Return the fields of `TrainingState` held here, without the sums. The buffers are valid on rank 0 only."""
        return {
            "model": dict(self.model.named_parameters()),
            "buffers": self.buffers(),
            "optimizer": plain_state(self.optimizer, self.rate),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            **({} if self.average is None else {"average": self.average.average}),
        }

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """Copy a checkpoint into this engine.

        Raises:
            RunFailedError: its weights are not those of the user's network; of the built-in one they have been checked.
        """
        try:
            put(self.model, {**state.model, **state.buffers})
        except ValueError as error:
            raise RunFailedError(f"the checkpoint is not of {self.spec.model.target}: {error}") from None
        self.rate = load_plain_state(self.optimizer, state.optimizer)
        if self.average is not None:
            assert state.average is not None
            self.average.load(state.average)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.updates = state.updates
        mine = slice(self.layout.mine.start, self.layout.mine.stop)
        self.sums.zero_()
        self.sums[mine].copy_(state.sums[mine])

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Make the slow and averaged weights equal to the fast ones."""
        fast: list[Tensor] = list(self.model.parameters())
        for average in (getattr(self.optimizer, "slow", None), self.average and self.average.average):
            if average:
                torch._foreach_copy_(average, fast)

    def share_buffers(self) -> None:
        """Copy rank 0's running statistics to every rank. Collective."""
        if self.layout.world_size > 1:
            for module in self.exact.norms:
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)
