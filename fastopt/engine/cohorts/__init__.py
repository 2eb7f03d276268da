"""Which parameters step with the same program, each with its scalars, and what of that the next step can keep."""
