"""Images: sources, decoding, and the data set on the training device."""
