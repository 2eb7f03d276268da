"""What is done with checkpoints by themselves, a window of memory at a time: made whole, exported, compared."""
