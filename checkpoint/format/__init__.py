"""What a checkpoint is made of: values, dtypes, parts of tensors, the manifest, and data files as bytes.

docs/checkpoint-format.md describes it.
"""
