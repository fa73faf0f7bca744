"""What decides, without I/O: which backend, and whether it may get connections."""
