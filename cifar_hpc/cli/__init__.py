"""One file a command: what `python -m cifar_hpc COMMAND` calls."""
