"""The training loop: epochs, steps, saving, stopping. Reads from top to bottom as what happens in a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch import Tensor

from cifar_hpc.config.io import to_plain
from cifar_hpc.config.schedule import epochs_left, learning_rate
from cifar_hpc.errors import RunFailedError
from cifar_hpc.randomness import permutation
from cifar_hpc.runs.history import losses
from cifar_hpc.runs.logs import read_jsonl, utc_now
from cifar_hpc.runs.metrics import metrics_text, restore_metrics, write_metrics
from cifar_hpc.training.checkpoints import format as checkpoint
from cifar_hpc.training.checkpoints.interval import Pace, seconds_alive
from cifar_hpc.training.checkpoints.store import BEST, CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.agreement import Agreement, Wish
from cifar_hpc.training.engine import NO_BAD_STEP, Engine
from cifar_hpc.training.evaluation import Result, evaluate


@dataclass
class Position:
    """Where a run stands, always at a step boundary."""

    epoch: int = 0  # epochs completed, evaluation and metrics row included
    step_in_epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0  # training time of this epoch so far, over all restarts
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "test_accuracy": -1.0})


# What of it stands in a checkpoint as it is.
STORED = ("epoch", "step_in_epoch", "step", "epoch_seconds", "best")


class Trainer:
    """Trains from a position to the last epoch, or until told to stop."""

    def __init__(
        self,
        engine: Engine,
        context: Context,
        agreement: Agreement,
        store: CheckpointStore | None,
        environment: dict[str, Any],
    ) -> None:
        self.engine, self.context, self.spec = engine, context, engine.spec
        self.agreement = agreement
        self.store = store  # on rank 0 only
        self.pace: Pace | None = None  # on rank 0 only, and only for checkpoint.every: auto
        self.environment = environment
        self.position = Position()
        self.stored = True  # whether the position at which training stopped is on disk
        self._saved: tuple[int, int] | None = None
        self._suspect = self._slow = False
        self._clock = self._last_line = self._last_save = time.monotonic()
        self._last_line_images = 0

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.engine.load(state)
        self.position = Position(**{key: state[key] for key in STORED}, history=checkpoint.history(state))
        self._saved = (state["step"], state["epoch"])

    def train(self) -> bool:
        """True after the last epoch, with its state on disk; False if stopped on request, with its state on disk if
        that was possible.

        Raises:
            RunFailedError: on rank 0, where the final state could not be written; on any, where the loss is not finite.
        """
        self._clock = self._last_line = self._last_save = time.monotonic()
        self._last_line_images = self._images_done()
        if self.store is not None and self.spec.checkpoint.automatic:
            past = losses(read_jsonl(self.context.paths.events))
            self.pace = Pace(past, seconds_alive(), self.context.log.line, self._clock)
        while self.position.epoch < self.spec.train.epochs:
            if not (self._train_epoch() and self._end_epoch()):
                self._save(queue=True)
                self.stored = self._settle() is None  # if it is not, the older checkpoint has to do
                return False
        error = self._settle()
        if self.store is not None:
            self._check_stored(error)
        return True

    def _check_stored(self, error: str | None) -> None:
        what = "the last checkpoint"
        if error is None and self.store is not None and self.store.best_error is not None:
            what, error = BEST, self.store.best_error
        try:
            write_metrics(self.context.paths.metrics, self.position.history)
        except OSError as problem:
            what, error = (what, error) if error is not None else ("metrics.jsonl", str(problem))
        if error is not None:
            raise RunFailedError(
                f"{what} could not be written: {error}. HINT: make room and submit again; the run goes on from the "
                "newest checkpoint that is there."
            )

    def _train_epoch(self) -> bool:
        position, engine, batch = self.position, self.engine, self.spec.train.batch_size
        order = permutation(self.spec.train.seed, position.epoch, len(engine.data.train_images)).to(engine.device)
        while position.step_in_epoch < engine.steps_per_epoch:
            began, first = time.monotonic(), position.step_in_epoch * batch
            engine.step(position.epoch, position.step_in_epoch, position.step, order[first : first + batch])
            position.step += 1
            position.step_in_epoch += 1
            self.context.heart.beat(f"step {position.step}", position.step)
            if not self.context.startup.over:
                engine.bad_step.item()  # waits for the device, this once
                self.context.say_first_step(position.step)
            answer = self.agreement.after_step(self._wish(began))
            if answer is Wish.STOP:
                return False
            every = self.spec.checkpoint.every_steps
            if answer is Wish.SAVE or (every is not None and position.step % every == 0):
                self._save()
            self._progress_line()
        return True

    def _wish(self, began: float) -> Wish:
        """What this rank asks for after a step that began at `began`. Rank 0 alone knows when a checkpoint is due."""
        now = time.monotonic()
        interval = self.spec.checkpoint.interval_seconds
        if self.pace is not None and self.store is not None:
            self.pace.step(now - began, self.store.busy, now)
            interval = self.pace.interval(now)
        if self.context.stop.requested:
            return Wish.STOP
        due = self.store is not None and interval is not None and now - self._last_save >= interval
        if due and self.store is not None and self.store.busy:
            self._say_slow()
            due = False
        if due:
            self._last_save = now  # once is enough, also where the wish is heeded a step later
        return Wish.SAVE if due or self._suspect else Wish.GO_ON

    def _end_epoch(self) -> bool:
        """Evaluate, write the epoch's row, save. False if told to stop before the row was written."""
        position, engine = self.position, self.engine
        sums = engine.gathered_sums()
        self._tick()
        started = time.monotonic()
        result = evaluate(engine, position.epoch, self._between)
        if result is None:
            return False
        row = self._row(sums, result, time.monotonic() - started)
        position.history.append(row)
        position.epoch += 1
        position.step_in_epoch, position.epoch_seconds = 0, 0.0
        self._clock = time.monotonic()
        engine.sums.zero_()
        best = result.accuracy > position.best["test_accuracy"]
        if best:
            position.best = {"epoch": position.epoch, "test_accuracy": result.accuracy}
        if self.store is not None:
            restore_metrics(self.context.paths.metrics, position.history)
            self.context.emit(
                "evaluated",
                epoch=position.epoch,
                step=position.step,
                test_accuracy=result.accuracy,
                test_loss=result.loss,
            )
            self._epoch_line(row)
        last = position.epoch == self.spec.train.epochs
        if last or best or position.epoch % self.spec.checkpoint.every_epochs == 0:
            self._save(slow_buffers=result.buffers, best=best, queue=True)
        return True

    def _row(self, sums: Tensor, result: Result, evaluation_seconds: float) -> dict[str, Any]:
        position, engine = self.position, self.engine
        loss, correct = (float(v) for v in sums.sum(0))
        images = engine.images_per_epoch
        return {
            "epoch": position.epoch + 1,
            "step": position.step,
            "images": (position.epoch + 1) * images,
            "train_loss": loss / images,
            "train_accuracy": 100 * correct / images,
            "test_loss": result.loss,
            "test_accuracy": result.accuracy,
            "lr": engine.optimizer.param_groups[0]["lr"],
            "epoch_seconds": round(position.epoch_seconds + evaluation_seconds, 3),
            "images_per_second": round(images / max(position.epoch_seconds, 1e-9), 2),
            "world_size": engine.layout.world_size,
            "shards": engine.layout.shards,
            "restart": self.context.restart,
            "job_id": self.context.launch.job_id,
            "time": utc_now(),
        }

    def _save(self, queue: bool = False, best: bool = False, slow_buffers: dict[str, Tensor] | None = None) -> None:
        """Snapshot now and write in the background. Collective.

        Args:
            queue: write it after what is being written; otherwise, while something is, skip this one.
        """
        sums = self.engine.gathered_sums()
        self._tick()
        self._last_save = time.monotonic()
        position, store = self.position, self.store
        here = (position.step, position.epoch)
        if store is None:
            return
        if store.busy and not queue:
            self._say_slow()
        elif self._saved != here or not store.holds(position.step):  # a folder may be removed under a run
            began = time.monotonic()
            store.save(
                checkpoint.to_host(
                    {
                        "format": checkpoint.FORMAT,
                        "spec": to_plain(self.spec),
                        **{key: getattr(position, key) for key in STORED},
                        **self.engine.state(),
                        "slow_buffers": slow_buffers,
                        "sums": sums,
                        "history": metrics_text(position.history),
                        "environment": self.environment,
                    }
                ),
                best,
            )
            self._saved = here
            if self.pace is not None:
                now = time.monotonic()
                self.pace.saved(now - began, now)

    def _say_slow(self) -> None:
        if not self._slow:
            self.context.log.line(
                "WARNING a checkpoint takes longer to write than the time to the next one: those that would come "
                "meanwhile are left out, and training goes on (said once)"
            )
        self._slow = True

    def _settle(self) -> str | None:
        """Wait, on every rank, until the last checkpoint is on disk; rank 0 gets the reason if it is not."""
        heart = self.context.heart
        error = self.store.wait(lambda: heart.beat("writing a checkpoint")) if self.store is not None else None
        self.agreement.now(Wish.GO_ON)
        return error

    def _tick(self) -> None:
        now = time.monotonic()
        self.position.epoch_seconds += now - self._clock
        self._clock = now

    def _images_done(self) -> int:
        position, engine = self.position, self.engine
        in_epoch = min(position.step_in_epoch * self.spec.train.batch_size, engine.images_per_epoch)
        return position.epoch * engine.images_per_epoch + in_epoch

    def _progress_line(self) -> None:
        now = time.monotonic()
        if now - self._last_line < self.spec.train.log_seconds:
            return
        # Once in log_seconds this waits for the device; the loop itself never does.
        self._suspect = int(self.engine.bad_step) < NO_BAD_STEP
        position, engine, done, images = self.position, self.engine, self._images_done(), self.engine.images_per_epoch
        loss, accuracy = engine.loss_so_far(done - position.epoch * images)
        rate = (done - self._last_line_images) / (now - self._last_line)
        left = timedelta(seconds=round(epochs_left(self.spec, done / images) * images / rate))
        lr = learning_rate(self.spec, position.epoch, engine.updates, engine.steps_per_epoch)
        self.context.log.line(
            f"epoch {position.epoch + 1}/{self.spec.train.epochs} "
            f"step {position.step_in_epoch}/{engine.steps_per_epoch} (total {position.step})  "
            f"loss {loss:.4f}  acc {accuracy:.2f}%  lr {lr:.6f}  {rate:,.1f} img/s  run ETA {left}"
        )
        self._last_line, self._last_line_images = now, done

    def _epoch_line(self, row: Mapping[str, Any]) -> None:
        best = self.position.best
        self.context.log.line(
            f"epoch {row['epoch']}/{self.spec.train.epochs} DONE  train loss {row['train_loss']:.4f} acc "
            f"{row['train_accuracy']:.2f}%  |  test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.2f}% "
            f"(best {best['test_accuracy']:.2f}% at {best['epoch']})  |  lr {row['lr']:.6f}  "
            f"{row['epoch_seconds']:.1f} s  {row['images_per_second']:,.1f} img/s"
        )
        self._last_line, self._last_line_images = time.monotonic(), self._images_done()

    def _between(self, text: str) -> bool:
        self.context.heart.beat(text)
        answer = self.agreement.now(Wish.STOP if self.context.stop.requested else Wish.GO_ON)
        if time.monotonic() - self._last_line >= self.spec.train.log_seconds:
            self.context.log.line(text)
            self._last_line = time.monotonic()
        return answer is Wish.STOP
