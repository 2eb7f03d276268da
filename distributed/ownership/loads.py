"""Sums by rank, for as many ranks as there may be."""

from __future__ import annotations

from itertools import accumulate


class Loads:
    """Numbers by rank that are added to intervals of ranks at once."""

    def __init__(self, world_size: int) -> None:
        self._steps = [0] * (world_size + 1)

    def add(self, first: int, stop: int, amount: int) -> None:
        """Add `amount` to the ranks `first` to `stop`."""
        self._steps[first] += amount
        self._steps[stop] -= amount

    def spread(self, start: int, stop: int, share: int, weight: int) -> None:
        """Add `weight` for each of the elements `start` to `stop`, of which every rank has `share` in a row."""
        if start == stop:
            return
        first, last = start // share, (stop - 1) // share
        if first == last:
            return self.add(first, first + 1, weight * (stop - start))
        self.add(first, first + 1, weight * ((first + 1) * share - start))
        self.add(first + 1, last, weight * share)
        return self.add(last, last + 1, weight * (stop - last * share))

    def totals(self) -> list[int]:
        """The number of every rank."""
        return list(accumulate(self._steps[:-1]))
