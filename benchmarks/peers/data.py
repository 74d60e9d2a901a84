"""The images as users have them: uint8 arrays that become PIL images, and torchvision's transforms on each."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

from cifar_hpc.data.synthetic import make_synthetic

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

# The report's, in its order.
TRAIN_TRANSFORM = transforms.Compose(
    [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(15),
        transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
        transforms.RandomErasing(p=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
    ]
)


class Images(Dataset):
    """Reads as torchvision.datasets.CIFAR10 does: an array of all images, one PIL image at a time.

    Args:
        images: uint8 [N, 32, 32, 3].
        labels: of each image.
    """

    def __init__(self, images: np.ndarray, labels: list[int], transform: transforms.Compose = TRAIN_TRANSFORM) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def synthetic_images(size: int) -> Images:
    """`size` training images of cifar_hpc.data.synthetic."""
    images, labels, _, _ = make_synthetic(size, 0)
    return Images(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()), labels.tolist())
