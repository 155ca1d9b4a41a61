"""A KV store for symbolic pools: answers come as messages, when and if the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pshare_jax.core import messages as m
from pshare_jax.core.plans import Load, StorePlan
from pshare_jax.core.prices import NOWHERE, SHARED, Prices
from tests.core.symbolic import SymbolicPool

PRICES = Prices(0.01, 0.0, {SHARED: 0.001}, {SHARED: 0.001})


@dataclass
class SymbolicStore:
    """Pages by key, for all workers. `faults` go wrong next: looks are `lost`, loads `failed`, and
    pages to be written `refused`; `forgotten` takes all pages away."""

    pages: dict[bytes, tuple[tuple[int, ...], list[int]]] = field(default_factory=dict)
    faults: deque[str] = field(default_factory=deque)

    def fault(self) -> str:
        """What goes wrong with the next action."""
        fault = self.faults.popleft() if self.faults else ""
        if fault == "forgotten":
            self.pages.clear()
        return fault


class SymbolicStoreEnd:
    """A worker's end; `send` carries a message to the worker."""

    def __init__(self, pool: SymbolicPool, store: SymbolicStore, send: Callable[[m.Message], None]):
        self.pool, self.store, self._send = pool, store, send
        self.staged: dict[int, list[list[int]]] = {}

    def run(self, plan: StorePlan) -> None:
        """See `StoreEnd.run`."""
        for transfer in plan.dropped:
            self.staged.pop(transfer, None)
        for look in plan.looks:
            places = [SHARED if key in self.store.pages else NOWHERE for key in look.keys]
            places = places[: [*places, NOWHERE].index(NOWHERE)]
            if self.store.fault() != "lost":
                self._send(m.Looked(look.id, places))
        for load in plan.loads:
            self._send(m.Loaded(load.transfer, self._load(load)))
        for commit in plan.commits:
            contents = self.staged.pop(commit.transfer)
            for page, content in zip(commit.pages, contents, strict=True):
                self.pool.pages[page] = list(content)
        kept = []
        for save in plan.saves:
            if self.store.fault() != "refused":
                count = len(save.tokens)
                unknown = [-1] * (self.pool.page_size - count)
                content = self.pool.pages[save.page][:count] + unknown
                self.store.pages.setdefault(save.key, (save.tokens, content))
                kept.append(save.key)
        if plan.saves:
            self._send(m.Stored([save.key for save in plan.saves], kept, []))
        gone = [key for key in plan.touched if key not in self.store.pages]
        if gone:
            self._send(m.Stored([], [], gone))

    def _load(self, load: Load) -> str | None:
        found = [self.store.pages.get(key) for key in load.keys]
        if self.store.fault() == "failed" or None in found:
            return "it could not be had"
        for page, tokens in zip(found, load.tokens, strict=True):
            assert page is not None
            if page[0] != tokens:
                return "other tokens"
        self.staged[load.transfer] = [page[1] for page in found if page is not None]
        return None
