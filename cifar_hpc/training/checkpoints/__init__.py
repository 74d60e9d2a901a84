"""The state of a run on disk: contents, folder, recovery, interval."""
