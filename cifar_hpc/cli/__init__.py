"""Commands, one file each. The only place that prints."""
