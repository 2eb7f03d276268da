"""The state of a sharded optimizer: 1-d slices where it steps, pieces with names and boxes in its state dict."""
