"""Job files, site profiles and the spec that they make. Never imports torch."""
