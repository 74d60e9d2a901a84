"""Figures of runs: the plot command, what it draws, and how figures look."""
