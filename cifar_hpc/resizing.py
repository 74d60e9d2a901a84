"""Images scaled down for progressive resizing; `image_sizes` says to what size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: int) -> Tensor:
    """Scale images down, each one alone, with the linear filter and antialiasing.

    Args:
        images: float [B, 3, 32, 32].
        size: height and width of the result, in pixels.

    Returns:
        [B, 3, size, size], channels_last; `images` itself where that is their size.
    """
    if size == images.shape[-1]:
        return images
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)
