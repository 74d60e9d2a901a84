"""A run on disk and in the queue: paths, lock, logs, events, history, state, requeue policy. Never imports torch."""
