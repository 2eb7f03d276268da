"""How long an iteration takes on several ranks with sharded optimizer state, beside others' ways and compute alone."""
