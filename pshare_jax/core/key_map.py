"""Which of many holders have which keys: a bit of an integer for each holder.

One step down a chain of keys is one `&`, whatever the number of holders, so that a prompt of 8,000
tokens is looked up among a thousand workers in some 20 us.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Mask = int
"""A set of holders: bit i is holder i."""


class KeyMap:
    """Keys, and who has them. Holders are numbers from 0 up."""

    def __init__(self) -> None:
        self._holders: dict[bytes, Mask] = {}

    def __len__(self) -> int:
        """Keys that somebody has."""
        return len(self._holders)

    def add(self, key: bytes, holder: int) -> None:
        """A holder has a key. Idempotent."""
        self._holders[key] = self._holders.get(key, 0) | 1 << holder

    def discard(self, key: bytes, holder: int) -> None:
        """A holder does not have a key (any more). Idempotent."""
        left = self._holders.get(key, 0) & ~(1 << holder)
        if left:
            self._holders[key] = left
        else:
            self._holders.pop(key, None)

    def runs(self, keys: Sequence[bytes], among: Mask) -> list[tuple[int, Mask]]:
        """Holders by how many of the first keys they have, most first; without those of none.

        Args:
            keys: a chain; what follows a key that a holder lacks does not count.
            among: who is asked about.

        Returns:
            Pairs of a number from 1 to `len(keys)` and the holders whose number it is.
        """
        found: list[tuple[int, Mask]] = []
        left, length = among, 0
        for key in keys:
            have = self._holders.get(key, 0) & left
            if have != left and length:
                found.append((length, left ^ have))
            left = have
            if not left:
                break
            length += 1
        if left and length:
            found.append((length, left))
        return found[::-1]


def members(mask: Mask) -> Iterator[int]:
    """The numbers of a set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
