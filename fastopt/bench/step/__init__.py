"""How long one optimizer step takes, beside others' optimizers and beside the least time that the memory allows."""
