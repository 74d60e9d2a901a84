"""What to augment, and how much. Never imports torch: the spec embeds this on machines that have none."""

from __future__ import annotations

from dataclasses import dataclass

from cifar_hpc.errors import SpecError
from cifar_hpc.spec_fields import check_bounds, option

IMAGE_SIZE = 32
"""Height and width of a CIFAR-10 image, in pixels."""


@dataclass(frozen=True)
class AugmentConfig:
    """The report's six augmentations, and one more, with torchvision's meaning; 0 switches one off at no cost.

    Raises:
        SpecError: for an impossible value; the message starts with the dotted key.
    """

    crop_padding: int = option(4, "zero padding, in pixels, before a crop to 32x32; 0 is off", low=0, high=31)
    flip: float = option(0.5, "probability of a horizontal flip; 0 is off", low=0, high=1)
    rotation: float = option(15.0, "largest angle of rotation, in degrees; 0 is off", low=0, high=180)
    brightness: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0)
    contrast: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0)
    saturation: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0)
    hue: float = option(0.1, "shift is uniform in [-x, x] turns of the circle; 0 is off", low=0, high=0.5)
    erasing: float = option(0.5, "probability of erasing a box after normalisation; 0 is off", low=0, high=1)
    erasing_scale: tuple[float, float] = option(
        (0.02, 0.33), "area of the erased box over area of the image, from and to", low=0, high=1
    )
    erasing_ratio: tuple[float, float] = option(
        (0.3, 3.3), "height over width of the erased box, from and to (log-uniform)", above=0
    )

    trivial: bool = option(False, "TrivialAugmentWide, on the image as it is, before all others")

    def __post_init__(self) -> None:
        check_bounds(self, "augment")  # the spec has done so; this is for a config that is built in Python
        for name in ("erasing_scale", "erasing_ratio"):
            first, last = getattr(self, name)
            if first > last:
                raise SpecError(f"augment.{name}: [{first:g}, {last:g}] is not allowed; allowed: the smaller first.")

    @property
    def geometric(self) -> bool:
        """Whether any pixel is moved (crop, flip or rotation)."""
        return self.crop_padding > 0 or self.flip > 0 or self.rotation > 0

    @property
    def jitter(self) -> bool:
        """Whether any colour is changed."""
        return self.blending or self.hue > 0

    @property
    def blending(self) -> bool:
        """Whether any of brightness, contrast and saturation is changed."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0

    @classmethod
    def off(cls) -> AugmentConfig:
        """No augmentation at all."""
        return cls(crop_padding=0, flip=0, rotation=0, brightness=0, contrast=0, saturation=0, hue=0, erasing=0)
