"""The data plane: sockets on a selectors loop."""
