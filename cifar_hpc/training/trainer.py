"""The training loop: epochs, steps, checkpoints, stopping. Reads from top to bottom in the order of a run."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cifar_hpc.config.io import to_plain
from cifar_hpc.config.schedule import epochs_left, learning_rate
from cifar_hpc.errors import RunFailedError
from cifar_hpc.randomness import permutation
from cifar_hpc.runs.events import Evaluated
from cifar_hpc.runs.logs import metrics_text, restore_metrics, utc_now, write_metrics
from cifar_hpc.text import duration
from cifar_hpc.training.checkpoints.format import TrainingState, to_host
from cifar_hpc.training.checkpoints.interval import CheckpointPacer
from cifar_hpc.training.checkpoints.store import BEST, CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.group import Agreement, Request
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.evaluation import Result, evaluate


@dataclass
class Position:
    """The position of a run, always at a step boundary. Its fields are those of `TrainingState`."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "test_accuracy": -1.0})
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl


class Trainer:
    """Trains from a position to the last epoch, or to a stop request.

    Args:
        store: on rank 0 only.
        environment: recorded in checkpoints.

    A loss that is not finite ends the run at the next progress line, checkpoint or end of an epoch: there the figures
    are read anyway, and no other step waits for the device.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        agreement: Agreement,
        store: CheckpointStore | None,
        environment: dict[str, Any],
    ) -> None:
        self.engine, self.context, self.spec = engine, context, engine.spec
        self.agreement, self.store, self.environment = agreement, store, environment
        self.pacer: CheckpointPacer | None = None
        self.position = Position()
        self.stored = True  # the position of a stop is on disk
        self._saved: tuple[int, int] | None = None  # step and epoch of the newest checkpoint
        self._epoch_saved = -math.inf  # when an epoch's end was last saved
        self._save_seconds = self.spec.checkpoint.interval_seconds  # between two checkpoints; None: not by time
        self._bad_loss = self._warned_slow = False
        self.figures = ""  # of the last line of progress
        self._start_clocks()

    def resume(self, state: TrainingState) -> None:
        """Continue from a checkpoint."""
        self.engine.load(state)
        self.position = Position(
            state.epoch, state.step_in_epoch, state.step, state.epoch_seconds, state.best, state.rows
        )
        self._saved = (state.step, state.epoch)

    def train(self, pacer: CheckpointPacer | None = None) -> bool:
        """Train to the last epoch. False after a stop request; `stored` then tells if the position is on disk.

        Args:
            pacer: on rank 0, for checkpoint.every: auto.

        Raises:
            RunFailedError: on rank 0, if the final state could not be written; on every rank, if the loss is not
                finite.
        """
        self.pacer = pacer
        self._start_clocks()
        self._report_position()
        while self.position.epoch < self.spec.train.epochs:
            if not (self._train_epoch() and self._end_epoch()):
                self._report_position()
                self.save(queue=True)
                self.stored = self._wait_until_stored() is None
                return False
        self.context.lock.renew()  # the folders may have been moved since the last report
        self._finish()
        return True

    def _start_clocks(self) -> None:
        self._clock = self._last_save = time.monotonic()
        self._restart_line_clock()

    # ------------------------------------------------------------ an epoch

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch. False if all ranks agreed to stop."""
        position, engine = self.position, self.engine
        order = permutation(self.spec.train.seed, position.epoch, len(engine.data.train_images)).to(engine.device)
        while position.step_in_epoch < engine.steps_per_epoch:
            began = time.monotonic()
            self._step(order)
            now = time.monotonic()
            self._measure(now - began, now)
            request = self._decide(now)
            if request is Request.SAVE:
                self._last_save = now  # one request is enough, also where it takes effect a step later
            agreed = self.agreement.after_step(request)
            if agreed is Request.STOP:
                return False
            self._act(agreed)
        return True

    def _step(self, order: Tensor) -> None:
        position = self.position
        self.engine.step(position.epoch, position.step_in_epoch, position.step, order)
        position.step += 1
        position.step_in_epoch += 1
        self.context.heart.beat(f"step {position.step}", position.step)
        if not self.context.startup.over:
            self.engine.bad_step.item()  # waits for the device, after the first step only
            self.context.say_first_step(position.step)
            self._report_position()  # a checkpoint may come before the first line
            self._restart_line_clock()  # it takes many times as long as another, and would spoil the first rate

    def _measure(self, seconds: float, now: float) -> None:
        """Update the checkpoint interval after a step, and warn of slow storage. Rank 0 only."""
        if self.store is None:
            return
        if self.pacer is not None:
            self.pacer.step(seconds, self.store.busy, now)
            self._save_seconds = self.pacer.interval(now)
        if self._save_due(now) and self.store.busy:
            self._warn_slow()

    def _decide(self, now: float) -> Request:
        """Return this rank's request. Only rank 0, which has the store, asks for checkpoints."""
        if self.context.stop.requested:
            return Request.STOP
        if self.store is not None and self._save_due(now) and not self.store.busy:
            return Request.SAVE
        return Request.CHECK if self._bad_loss else Request.GO_ON

    def _save_due(self, now: float) -> bool:
        return self._save_seconds is not None and now - self._last_save >= self._save_seconds

    def _act(self, agreed: Request) -> None:
        """Save, check and log after a step that is not the last one."""
        every = self.spec.checkpoint.every_steps
        if agreed is Request.SAVE or (every is not None and self.position.step % every == 0):
            self.save()
        elif agreed is Request.CHECK:
            self.engine.check_finite()
        if self._line_due() and self._images_done() > self._last_line_images:
            self._bad_loss = self.engine.bad_loss() is not None
            self._progress_line()

    def _end_epoch(self) -> bool:
        """Evaluate, add the epoch's row, save. False if all ranks agreed to stop during the evaluation."""
        self.engine.check_finite()
        sums = self.engine.epoch_sums()
        self._tick()
        began = time.monotonic()
        result = evaluate(self.engine, self.position.epoch, self._between_batches)
        if result is None:
            return False
        row = self._row(sums, result, time.monotonic() - began)
        best = self._complete_epoch(row)
        if not self.context.startup.over:
            self.context.startup.lap("evaluation")  # which a stop had interrupted: no part of the first step
        if self.store is not None:
            self._report_epoch(row)
        epoch, every = self.position.epoch, self.spec.checkpoint.every_epochs
        certain = epoch == self.spec.train.epochs or (every is not None and epoch % every == 0)
        if certain or best or every is None:
            self.save(slow_buffers=result.buffers, best=best, queue=True, certain=certain)
        return True

    def _complete_epoch(self, row: dict[str, Any]) -> bool:
        """Move the position to the start of the next epoch. True if this epoch is the best one so far."""
        position = self.position
        position.history.append(row)
        position.epoch += 1
        position.step_in_epoch, position.epoch_seconds = 0, 0.0
        self.engine.sums.zero_()
        self._clock = time.monotonic()
        if row["test_accuracy"] <= position.best["test_accuracy"]:
            return False
        position.best = {"epoch": position.epoch, "test_accuracy": row["test_accuracy"]}
        return True

    def _between_batches(self, text: str) -> bool:
        """Report the progress of an evaluation. True if all ranks agreed to stop."""
        self.context.heart.beat(text)
        if self._line_due():
            self.context.log.line(text)
            self._restart_line_clock()
        return self.agreement.now(Request.STOP if self.context.stop.requested else Request.GO_ON) is Request.STOP

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
            "lr": engine.rate,
            "epoch_seconds": round(position.epoch_seconds + evaluation_seconds, 3),
            "images_per_second": round(images / max(position.epoch_seconds, 1e-9), 2),
            "world_size": engine.layout.world_size,
            "shards": engine.layout.shards,
            "restart": self.context.restart,
            "job_id": self.context.launch.job_id,
            "time": utc_now(),
        }

    # ------------------------------------------------------------ checkpoints

    def save(
        self,
        queue: bool = False,
        best: bool = False,
        slow_buffers: dict[str, Tensor] | None = None,
        certain: bool = True,
    ) -> None:
        """Copy the training state and write it in the background. Collective.

        Args:
            queue: write it after the one being written; otherwise this one is skipped while another is being written.
            slow_buffers: at an epoch's end.
            certain: otherwise the pacer may leave it out, and the best state waits in memory for the next write.

        Raises:
            RunFailedError: on every rank, if the loss or the weights are not finite.
        """
        self.engine.check_finite()
        sums = self.engine.epoch_sums()
        self._tick()
        began = time.monotonic()
        store, here = self.store, (self.position.step, self.position.epoch)
        if store is None:
            return
        if not certain and self.pacer and began - self._epoch_saved < self.pacer.epoch_interval(began):
            if best:
                store.hold(self._state(sums, slow_buffers))
            return
        self._last_save = began
        if slow_buffers is not None:
            self._epoch_saved = began
        if store.busy and not queue:
            self._warn_slow()
        elif self._saved != here or not store.holds(self.position.step):  # the folder may have been removed
            store.save(self._state(sums, slow_buffers), best)
            self._saved = here
            if self.pacer is not None:
                now = time.monotonic()
                self.pacer.saved(now - began, now)

    def _state(self, sums: Tensor, slow_buffers: dict[str, Tensor] | None) -> TrainingState:
        fields = {
            "spec": to_plain(self.spec),
            **vars(self.position),
            "history": metrics_text(self.position.history),
            **self.engine.state(),
            "slow_buffers": slow_buffers,
            "sums": sums,
            "environment": self.environment,
            "dataset": asdict(self.engine.data.info),
        }
        return TrainingState(**to_host(fields, self.context.log.warn))

    def _warn_slow(self) -> None:
        if not self._warned_slow:
            self.context.log.warn(
                "a checkpoint takes longer to write than the time to the next one: checkpoints that are due "
                "meanwhile are skipped, and training continues (this warning comes once)"
            )
        self._warned_slow = True

    def _wait_until_stored(self) -> str | None:
        """Wait on every rank until the last checkpoint is on disk. Return the error on rank 0, if any."""
        heart = self.context.heart
        error = self.store.wait(lambda: heart.beat("writing a checkpoint")) if self.store is not None else None
        self.agreement.now(Request.GO_ON)  # as a barrier
        return error

    def _finish(self) -> None:
        """Wait until all results are on disk."""
        errors = {"the last checkpoint": self._wait_until_stored()}
        if self.store is None:
            return
        errors[BEST] = self.store.best_error
        try:
            write_metrics(self.context.paths.metrics, self.position.history)
        except OSError as error:
            errors["metrics.jsonl"] = str(error)
        for what, reason in errors.items():
            if reason is not None:
                raise RunFailedError(
                    f"{what} could not be written: {reason}. HINT: free some space and submit again; the run continues "
                    "from its newest checkpoint."
                )

    # ------------------------------------------------------------ reports

    def _report_epoch(self, row: Mapping[str, Any]) -> None:
        """Write the epoch to metrics.jsonl, events.jsonl and train.log. Rank 0 only."""
        restore_metrics(self.context.paths.metrics, self.position.history)
        figures = {key: row[key] for key in ("epoch", "step", "test_accuracy", "test_loss")}
        self.context.emit(Evaluated(**figures))
        best = " (best)" if self.position.best["epoch"] == row["epoch"] else ""
        self.context.log.line(
            f"epoch {row['epoch']}/{self.spec.train.epochs} DONE  train loss {row['train_loss']:.3f}  "
            f"test {row['test_accuracy']:.2f}%{best}  {duration(row['epoch_seconds'])}"
        )
        self._restart_line_clock()

    def _progress_line(self) -> None:
        position, engine, done, images = self.position, self.engine, self._images_done(), self.engine.images_per_epoch
        loss, accuracy = engine.loss_so_far(done - position.epoch * images)
        rate = (done - self._last_line_images) / (time.monotonic() - self._last_line)
        left = epochs_left(self.spec, done / images) * images / rate
        lr = learning_rate(self.spec, position.epoch, engine.updates, engine.steps_per_epoch)
        self.figures = f"loss {loss:.3f}  {rate:,.{1 if rate < 100 else 0}f} img/s  run ETA {duration(left)}"
        where = f"epoch {position.epoch + 1}/{self.spec.train.epochs}"
        self.context.log.line(f"{where} step {position.step_in_epoch}/{engine.steps_per_epoch}  {self.figures}")
        self._report_position(left, loss=loss, accuracy=accuracy, lr=lr, images_per_second=rate)
        self._restart_line_clock()

    def _report_position(self, eta_by_rate: float | None = None, **figures: float) -> None:
        """Write the position, and figures of training, to progress.json."""
        epoch = self._images_done() / self.engine.images_per_epoch
        self.context.report(eta_by_rate, step=self.position.step, epoch=epoch, **figures)

    def _line_due(self) -> bool:
        return time.monotonic() - self._last_line >= self.spec.train.log_seconds

    def _restart_line_clock(self) -> None:
        self._last_line, self._last_line_images = time.monotonic(), self._images_done()

    def _images_done(self) -> int:
        position, engine = self.position, self.engine
        in_epoch = min(position.step_in_epoch * self.spec.train.batch_size, engine.images_per_epoch)
        return position.epoch * engine.images_per_epoch + in_epoch

    def _tick(self) -> None:
        """Add the time since the last call to the epoch's training time."""
        now = time.monotonic()
        self.position.epoch_seconds += now - self._clock
        self._clock = now
