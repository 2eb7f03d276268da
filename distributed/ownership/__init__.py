"""Who owns what of which parameter: pure values and functions, the same on every rank, tested without processes."""
