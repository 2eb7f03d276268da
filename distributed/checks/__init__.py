"""What ranks must agree on, and how a difference becomes the same exception on all of them."""
