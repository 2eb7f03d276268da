"""The way of a save: compared among the ranks, copied aside, written by each rank, assembled to a manifest."""
