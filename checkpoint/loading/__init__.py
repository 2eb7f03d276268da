"""The way of a load: a checkpoint found, matched with the live objects, read and verified, then given to them."""
