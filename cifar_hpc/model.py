"""The model's old place, which the cards of exported models name."""

from cifar_hpc.models.improved_resnet import ImprovedResNet as ImprovedResNet
