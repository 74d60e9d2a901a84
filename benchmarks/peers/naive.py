"""A PyTorch script as the report's authors would write it: float32, stock layouts, torch.save each epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.lookahead import Lookahead
from benchmarks.peers.network import Network


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
        workers: of the DataLoader; 2, as in PyTorch's own CIFAR-10 tutorial.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=workers)
    model = Network(width).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    optimizer = Lookahead(sgd, k=5, alpha=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=400)

    for epoch in range(epochs):
        model.train()
        running_loss, correct, total = 0.0, 0, 0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            _, predicted = outputs.max(1)
            total += labels.size(0)
            correct += predicted.eq(labels).sum().item()
            after_step()
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {running_loss / len(loader):.4f}, accuracy {100 * correct / total:.2f}%")
        torch.save(model.state_dict(), folder / "checkpoint.pth")
