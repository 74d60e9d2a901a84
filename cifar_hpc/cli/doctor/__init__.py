"""The command doctor: checks of this machine, of Slurm and of the compute nodes."""
