"""How fast checkpoints are saved and loaded, beside raw file access, torch.save and torch.distributed.checkpoint."""
