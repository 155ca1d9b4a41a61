"""Routing in virtual time: the costs of `pshare_jax.core.router`, over chains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from pshare_jax.bench.plan.chains import ChainPool, Key
from pshare_jax.bench.plan.requests import SimRequest

COMPUTE_WEIGHT = 2
"""As in `pshare_jax.core.router`, which a test compares."""


class PrefillTarget(Protocol):
    """What the router looks at in a prefill engine."""

    pool: ChainPool

    @property
    def num_pending_tokens(self) -> int: ...  # noqa: D102


class SimRouter:
    """Chooses a prefill and a decode engine for each request.

    Args:
        prefill: the prefill engines.
        decode: the decode engines' pools.
    """

    def __init__(self, prefill: Sequence[PrefillTarget], decode: Sequence[ChainPool]):
        self._prefill = prefill
        self._decode = decode
        self._sent: list[OrderedDict[Key, int]] = [OrderedDict() for _ in prefill]
        self._sent_pages = [0] * len(prefill)
        self._load = [0] * len(decode)
        self._assigned: dict[SimRequest, tuple[int, int]] = {}

    def route(self, request: SimRequest, decode_engines: Sequence[int]) -> None:
        """Sets the request's `prefill_engine`, `num_uncached` and `decode_engine`."""
        self.forget(request)
        uncached = [self._num_uncached(i, request) for i in range(len(self._prefill))]

        def prefill_cost(i: int) -> tuple[int, int, int]:
            waiting = self._prefill[i].num_pending_tokens
            return COMPUTE_WEIGHT * uncached[i] + waiting, self._sent_pages[i], i

        engine = min(range(len(self._prefill)), key=prefill_cost)
        request.prefill_engine, request.num_uncached = engine, uncached[engine]
        self._remember(engine, request)

        def decode_cost(i: int) -> tuple[int, int]:
            held = _whole(self._decode[i], self._decode[i].tokens(request.chain), request.cover)
            return self._load[i] + self._pages(i, request) - held // self._decode[i].page_size, i

        engine = min(decode_engines, key=decode_cost)
        request.decode_engine = engine
        self._load[engine] += self._pages(engine, request)
        self._assigned[request] = engine, self._pages(engine, request)

    def forget(self, request: SimRequest) -> None:
        """The request has ended, or is routed again."""
        engine, pages = self._assigned.pop(request, (0, 0))
        self._load[engine] -= pages

    def _pages(self, engine: int, request: SimRequest) -> int:
        return self._decode[engine].pages_for(request.num_tokens)

    def _num_uncached(self, engine: int, request: SimRequest) -> int:
        pool, sent = self._prefill[engine].pool, self._sent[engine].get(request.chain, 0)
        if sent >= request.cover:
            return 0
        return request.cover - max(
            _whole(pool, pool.tokens(request.chain), request.cover),
            _whole(pool, sent, request.cover),
        )

    def _remember(self, engine: int, request: SimRequest) -> None:
        sent, pool = self._sent[engine], self._prefill[engine].pool
        before = sent.pop(request.chain, 0)
        sent[request.chain] = max(before, request.cover)
        self._sent_pages[engine] += pool.pages_for(sent[request.chain]) - pool.pages_for(before)
        while self._sent_pages[engine] > pool.num_usable and len(sent) > 1:
            _, tokens = sent.popitem(last=False)
            self._sent_pages[engine] -= pool.pages_for(tokens)


def _whole(pool: ChainPool, tokens: int, cover: int) -> int:
    """Tokens of the full pages among the first `tokens` of a prompt."""
    tokens = min(tokens, cover)
    return tokens - tokens % pool.page_size
