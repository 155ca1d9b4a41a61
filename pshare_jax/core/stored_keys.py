"""Which keys the KV store is known to have, by what prefill workers say of it."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from pshare_jax.core.sequences import Sequence

MAX_KEYS = 2**18
"""Keys that are remembered; those that were heard of first are forgotten."""


class StoredKeys(Collection[bytes]):
    """Keys of pages that no worker has to compute."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def changed(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Some keys are there now, and others no longer."""
        for key in added:
            self._keys[key] = None
            self._keys.move_to_end(key)
        for key in removed:
            self._keys.pop(key, None)
        while len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)

    def lacking(self, sequence: Sequence, page_size: int) -> int:
        """Prompt tokens of a sequence whose KV the store is not known to have."""
        if sequence.last_key in self:
            return 0
        run = itertools.takewhile(self.__contains__, sequence.keys)
        return sequence.covered - page_size * sum(1 for _ in run)
