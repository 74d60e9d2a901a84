"""The spec's old place, which the cards of exported models name."""

from cifar_hpc.config.spec import ModelSpec as ModelSpec
