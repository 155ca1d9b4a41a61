"""Which prefill engine covers a prompt, and which decode engine generates. No jax here.

A prefill engine costs the tokens that wait there, plus twice the tokens of this prompt that it
would have to compute: those delay this prompt as waiting does, and all others besides. So a
session stays with the engine that has its context, and prompts that come at once for several
models meet on one engine, until that is behind by more than the context is worth. A decode engine
costs the pages that its sequences read in each step, plus the pages that it would have to receive.
(The costs are in the manner of NVIDIA Dynamo's KV router.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Sequence_
from typing import Protocol

from pshare_jax.cache.page_cache import PageCache
from pshare_jax.engine.sequence import Sequence

COMPUTE_WEIGHT = 2
"""What computing a token costs, in tokens of waiting."""


class PrefillTarget(Protocol):
    """What the router looks at in a prefill engine."""

    cache: PageCache

    @property
    def num_pending_tokens(self) -> int: ...  # noqa: D102


class Router:
    """Routes sequences; remembers where prompts were sent, since their KV will soon be there.

    Thread-safe.

    Args:
        prefill: the prefill engines.
        decode: the page books of the decode engines.
    """

    def __init__(self, prefill: Sequence_[PrefillTarget], decode: Sequence_[PageCache]):
        self._prefill = prefill
        self._decode = decode
        self._sent: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in prefill]
        self._load = [0] * len(decode)
        self._assigned: dict[Sequence, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def route(self, sequence: Sequence) -> None:
        """Sets the sequence's `prefill_engine`, `num_uncached` and `decode_engine`.

        A sequence that is routed again, after a preemption, leaves its old engines.
        """
        with self._lock:
            self._forget(sequence)
            self._route_prefill(sequence)
            self._route_decode(sequence)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. Idempotent."""
        with self._lock:
            self._forget(sequence)

    def _route_prefill(self, sequence: Sequence) -> None:
        uncached = [self._num_uncached(i, sequence) for i in range(len(self._prefill))]

        def cost(i: int) -> tuple[int, int, int]:
            waiting = self._prefill[i].num_pending_tokens
            # Among equals the emptiest pool, so that new sessions spread.
            return COMPUTE_WEIGHT * uncached[i] + waiting, len(self._sent[i]), i

        engine = min(range(len(self._prefill)), key=cost)
        sequence.prefill_engine, sequence.num_uncached = engine, uncached[engine]
        self._remember(engine, sequence.chain)

    def _num_uncached(self, engine: int, sequence: Sequence) -> int:
        cache, sent = self._prefill[engine].cache, self._sent[engine]
        held = cache.matched_tokens(sequence.keys, sequence.prompt)
        if sequence.chain[-1] in sent:
            return 0
        coming = 0
        for key in sequence.keys:
            if key not in sent:
                break
            coming += cache.page_size
        return sequence.cover - max(held, coming)

    def _route_decode(self, sequence: Sequence) -> None:
        def num_pages(i: int) -> int:
            return -(-sequence.num_tokens // self._decode[i].page_size)

        def cost(i: int) -> tuple[int, int]:
            cache = self._decode[i]
            held = cache.matched_tokens(sequence.keys, sequence.prompt) // cache.page_size
            return self._load[i] + num_pages(i) - held, i

        engine = min(sequence.model.decode_engines, key=cost)
        sequence.decode_engine = engine
        self._load[engine] += num_pages(engine)
        self._assigned[sequence] = engine, num_pages(engine)

    def _forget(self, sequence: Sequence) -> None:
        engine, num_pages = self._assigned.pop(sequence, (0, 0))
        self._load[engine] -= num_pages

    def _remember(self, engine: int, chain: list[bytes]) -> None:
        sent = self._sent[engine]
        for key in chain:
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._prefill[engine].cache.num_usable:
            sent.popitem(last=False)
