"""The parts of the training job `scripts/train.py`: one idea per file."""
