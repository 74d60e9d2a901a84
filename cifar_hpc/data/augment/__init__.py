"""Augmentation and mixing, batched on the device, as pure functions of the draws."""
