"""A prefill core with a store whose answers the test gives."""

from __future__ import annotations

import itertools

from pshare_jax.core import messages as m
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import block_key, block_keys, root_key
from pshare_jax.core.plans import PrefillPlan, PrefillResult, StorePlan
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.prices import SHARED, Prices
from pshare_jax.core.requests import SamplingParams
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.store_client import StoreClient
from tests.core.setting import model_specs

PAGE = 4
PRICES = Prices(0.01, 0.0, {SHARED: 0.001}, {SHARED: 0.001})


class Bench:
    """A prefill core with a store whose answers the test gives."""

    def __init__(self, pages: int = 40, prices: Prices = PRICES):
        self.cache = PageCache(pages, PAGE)
        self.core = PrefillCore("prefill0", self.cache, model_specs(["decode0"]), [8])
        self.client = StoreClient(self.cache, prices, itertools.count(1))
        self.core.store = self.client
        self.now = 0.0
        self._ids = itertools.count()

    def prompt(self, tokens: int, seed: int = 0) -> Sequence:
        """A prompt of which so many tokens have to be covered."""
        prompt = tuple(range(100 * seed, 100 * seed + tokens + 1))
        root = root_key("base", "")
        keys = block_keys(root, prompt[:tokens], PAGE)
        rest = prompt[len(keys) * PAGE : tokens]
        id = next(self._ids)
        return Sequence(
            id=id,
            order=id,
            model="identity",
            prompt=prompt,
            covered=tokens,
            root=root,
            keys=keys,
            last_key=block_key(keys[-1] if keys else root, rest),
            params=SamplingParams(),
            prefill_worker="prefill0",
            decode_worker="decode0",
        )

    def ask(self, tokens: int, seed: int = 0) -> Sequence:
        """Sends a prompt."""
        sequence = self.prompt(tokens, seed)
        self.core.receive(m.Prefill(sequence))
        return sequence

    def store(self) -> StorePlan | None:
        """The next plan, which must be for the store alone, carried out."""
        plan = self.core.schedule(self.now)
        if plan is None:
            return None
        assert plan.chunks == []
        self.core.apply(plan, PrefillResult())
        return plan.store

    def chunk(self) -> PrefillPlan:
        """The next plan, which must compute, carried out."""
        plan = self.core.schedule(self.now)
        assert plan is not None
        assert plan.chunks
        self.core.apply(plan, PrefillResult())
        return plan

    def covered(self) -> list[int]:
        """Sequences that have been covered since the last call."""
        told = [message for _, message in self.core.outbox]
        self.core.outbox.clear()
        return [c.sequence.id for c in told if isinstance(c, m.Covered)]
