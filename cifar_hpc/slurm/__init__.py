"""Slurm's commands: questions to the scheduler and requests of it. Knows nothing of runs."""
