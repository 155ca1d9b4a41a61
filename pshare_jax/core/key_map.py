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
        # Most keys have one holder, which is kept as -1 - holder: a set takes as many bits as there
        # are holders.
        self._holders: dict[bytes, int] = {}
        self._alone: list[int] = []
        self._bits: list[Mask] = []

    def __len__(self) -> int:
        """Keys that somebody has."""
        return len(self._holders)

    def add(self, key: bytes, holder: int) -> None:
        """A holder has a key. Idempotent."""
        while holder >= len(self._bits):
            self._alone.append(-1 - len(self._bits))
            self._bits.append(1 << len(self._bits))
        found = self._holders.get(key)
        if found is None:
            self._holders[key] = self._alone[holder]
        elif found != -1 - holder:
            self._holders[key] = self._mask(found) | self._bits[holder]

    def discard(self, key: bytes, holder: int) -> None:
        """A holder does not have a key (any more). Idempotent."""
        found = self._holders.get(key)
        if found is None:
            return
        left = self._mask(found) & ~(1 << holder)
        if not left:
            del self._holders[key]
        elif left & (left - 1):
            self._holders[key] = left
        else:
            self._holders[key] = self._alone[left.bit_length() - 1]

    def _mask(self, found: int) -> Mask:
        return found if found > 0 else self._bits[-1 - found]

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
            holders = self._holders.get(key)
            have = 0 if holders is None else self._mask(holders) & left
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
