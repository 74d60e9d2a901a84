"""One attempt at a run: loop, ranks, checkpoints, failures. Never imports submitit or rich."""
