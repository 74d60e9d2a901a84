"""The command plot: figures of runs."""
