"""What one collective moves, and in what order: the elements of a bucket, rank by rank, and a header for each.

Pure, but for the copies into and out of that order.
"""
