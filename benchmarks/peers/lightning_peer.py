"""A LightningModule under a default Trainer: bf16-mixed, a ModelCheckpoint each epoch, no channels_last.

Without Lookahead, which has no ready optimizer in PyTorch or Lightning: its users would leave it out. That is less work
than the others do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.network import Network

try:
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
except ImportError:  # its other name
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint


class Classifier(lightning.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = Network(width)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, labels = batch
        logits = self.network(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        self.log("train_loss", loss)
        self.log("train_accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400),
        }


class AfterStep(Callback):
    """Calls `after_step` after each batch."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        self.after_step = after_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_step()


def train(
    images: Dataset,
    folder: Path,
    after_step: Callable[[], None],
    epochs: int = 400,
    batch_size: int = 128,
    workers: int = 2,
    width: int = 64,
) -> None:
    """Train on `images`, with a checkpoint in `folder` after each epoch.

    Args:
        after_step: called after each update; training ends where it raises.
        workers: of the DataLoader.
    """
    loader = DataLoader(
        images, batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, every_n_epochs=1), AfterStep(after_step)],
    )
    trainer.fit(Classifier(width), loader)
