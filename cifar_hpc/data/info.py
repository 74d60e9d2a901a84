"""Facts of a data set, without its images, for networks and readers of results."""

from dataclasses import dataclass

Channels = tuple[float, float, float]
CIFAR10: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN: Channels = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Channels = (0.2470, 0.2435, 0.2616)
SYNTHETIC = tuple("disc ring square triangle cross horizontal vertical diagonal checkerboard dots".split())
UNKNOWN = tuple(f"class {label}" for label in range(10))


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set, recorded in each checkpoint.

    Attributes:
        classes: names, in the order of the labels.
        image_size: height and width, in pixels.
        mean, std: of the training images' red, green and blue, scaled to [0, 1].
    """

    classes: tuple[str, ...] = UNKNOWN
    image_size: int = 32
    mean: Channels = CIFAR10_MEAN
    std: Channels = CIFAR10_STD
