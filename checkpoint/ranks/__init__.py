"""The processes that save or load together."""
