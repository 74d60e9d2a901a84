"""Facts of a data set that networks and results need, without its images."""

from dataclasses import dataclass

Channels = tuple[float, float, float]
CIFAR10_MEAN: Channels = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Channels = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set, recorded in each checkpoint.

    Attributes:
        classes: names, in the order of the labels.
        image_size: height and width, in pixels.
        mean, std: of the training images' red, green and blue, scaled to [0, 1].
    """

    classes: tuple[str, ...]
    image_size: int
    mean: Channels = CIFAR10_MEAN
    std: Channels = CIFAR10_STD
