"""Whether and how to mix images of a batch. Never imports torch: the spec embeds this on machines that have none."""

from __future__ import annotations

from dataclasses import dataclass

from cifar_hpc.spec_fields import check_bounds, option


@dataclass(frozen=True)
class MixingConfig:
    """Mixup and CutMix with their papers' meaning, drawn for each sample alone; with both on, each takes one of them.

    Raises:
        SpecError: for an impossible value; the message starts with the dotted key.
    """

    mixup: float = option(0.0, "alpha: shares of two images are from Beta(alpha, alpha); 0 is off", low=0, high=100)
    cutmix: float = option(0.0, "alpha: area of the pasted box is from Beta(alpha, alpha); 0 is off", low=0, high=100)
    probability: float = option(1.0, "probability that a sample is mixed at all; 0 is off", low=0, high=1)

    def __post_init__(self) -> None:
        check_bounds(self, "mixing")  # the spec has done so; this is for a config that is built in Python

    @property
    def on(self) -> bool:
        """Whether any image is changed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0
