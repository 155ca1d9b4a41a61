"""Sizes that are compiled, and how much of a larger size is padding."""

from __future__ import annotations

from collections.abc import Sequence

TRANSFER_BUCKETS = (1, 4, 16)
"""Pages moved by one device call of the handoff."""


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        ValueError: `size` is larger than every bucket.
    """
    fitting = [bucket for bucket in buckets if bucket >= size]
    if not fitting:
        raise ValueError(f"no bucket of {sorted(buckets)} holds {size}")
    return min(fitting)


def pieces(size: int, buckets: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts `size` items into (length, bucket) pieces: largest buckets first, then one that fits."""
    largest = max(buckets)
    cut = [(largest, largest)] * (size // largest)
    rest = size % largest
    return [*cut, (rest, bucket_for(rest, buckets))] if rest else cut
