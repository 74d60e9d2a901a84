"""cifar_hpc: preemptible CIFAR-10 training on Slurm that ends in the same bits whatever happens on the way."""

__version__ = "0.1.0"
