"""Networks, and the layers that keep them exact for any number of processes."""
