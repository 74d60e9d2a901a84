"""A careful PyTorch script: bf16 autocast, channels_last, workers that stay, DDP where torchrun starts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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
    bf16: bool = True,
) -> None:
    """Train on `images`, with a checkpoint of everything in `folder` after each epoch.

    Args:
        after_step: called after each update; training ends where it raises.
        batch_size: of all processes together.
        workers: of the DataLoader of each process.
        bf16: false where the processor has no such arithmetic.
    """
    world, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    sampler = DistributedSampler(images) if world > 1 else None
    loader = DataLoader(
        images,
        batch_size=batch_size // world,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=cuda,
        drop_last=True,
    )
    model: torch.nn.Module = Network(width).to(device, memory_format=torch.channels_last)
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[local_rank] if cuda else None)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    optimizer = Lookahead(sgd, k=5, alpha=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=400)

    for epoch in range(epochs):
        model.train()
        if sampler is not None:
            sampler.set_epoch(epoch)
        total_loss = torch.zeros((), device=device)
        for inputs, labels in loader:
            inputs = inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(inputs), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
            after_step()
        scheduler.step()
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"epoch {epoch + 1}: loss {total_loss.item() / len(loader):.4f}")
            state = {"model": model.state_dict(), "optimizer": sgd.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save({**state, "slow": optimizer.slow, "epoch": epoch + 1}, folder / "checkpoint.pth")
    if world > 1:
        dist.destroy_process_group()
