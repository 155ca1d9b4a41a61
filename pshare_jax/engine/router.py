"""Which prefill engine covers a prompt, and which decode engine generates. No jax here.

The cost of a prefill engine is the tokens that it would still have to compute: the part of the
prompt that it does not hold, plus what already waits there. So a session stays with the engine that
has its context until that engine is behind by more than the context is worth. The cost
of a decode engine is its pages in use plus the pages that it would have to receive. (The costs
are those of NVIDIA Dynamo's KV router, in tokens and pages.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Sequence_
from typing import Protocol

from pshare_jax.cache.page_cache import PageCache
from pshare_jax.engine.sequence import Sequence


class PrefillTarget(Protocol):
    """What the router looks at in a prefill engine."""

    cache: PageCache

    @property
    def num_pending_tokens(self) -> int: ...  # noqa: D102


class DecodeTarget(Protocol):
    """What the router looks at in a decode engine."""

    cache: PageCache


class Router:
    """Routes sequences; remembers where prompts were sent, since their KV will soon be there.

    Thread-safe.
    """

    def __init__(self, prefill: Sequence_[PrefillTarget], decode: Sequence_[DecodeTarget]):
        self._prefill = prefill
        self._decode = decode
        self._sent: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in prefill]
        self._lock = threading.Lock()

    def route(self, sequence: Sequence) -> None:
        """Sets the sequence's `prefill_engine` and `decode_engine`."""
        with self._lock:
            sequence.prefill_engine = min(
                range(len(self._prefill)), key=lambda i: self._prefill_cost(i, sequence)
            )
            sequence.decode_engine = min(
                sequence.model.decode_engines, key=lambda i: self._decode_cost(i, sequence)
            )
            self._remember(sequence.prefill_engine, sequence.keys)

    def _prefill_cost(self, engine: int, sequence: Sequence) -> tuple[int, int, int]:
        target = self._prefill[engine]
        held = target.cache.matched_tokens(sequence.keys, sequence.prompt)
        sent = 0
        for key in sequence.keys:
            if key not in self._sent[engine]:
                break
            sent += target.cache.page_size
        uncached = sequence.cover - max(held, sent)
        # Among equals the emptiest pool, so that new sessions spread.
        return uncached + target.num_pending_tokens, len(self._sent[engine]), engine

    def _decode_cost(self, engine: int, sequence: Sequence) -> tuple[int, int]:
        cache = self._decode[engine].cache
        held = cache.matched_tokens(sequence.keys, sequence.prompt) // cache.page_size
        missing = -(-sequence.num_tokens // cache.page_size) - held
        return cache.num_usable - cache.num_available + missing, engine

    def _remember(self, engine: int, keys: list[bytes]) -> None:
        sent = self._sent[engine]
        for key in keys:
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._prefill[engine].cache.num_usable:
            sent.popitem(last=False)
