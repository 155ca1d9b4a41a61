"""A KV store in virtual time: one tier that is read in order, and what is in it.

Pages are known by their keys alone. Reading takes what the prices say, one load after the other,
for all workers; writing takes as long, beside reading. Least recently used pages go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pshare_jax.bench.plan.clock import Clock
from pshare_jax.core import messages as m
from pshare_jax.core.plans import Load, StorePlan
from pshare_jax.core.prices import SHARED, Prices


@dataclass(frozen=True)
class StoreSpec:
    """A tier.

    Args:
        pages: that it holds.
        call: seconds to begin a load.
        page: seconds to read a page.
        copy: seconds to copy a page out of a pool or into it, on the processor.
        hidden: seconds of a load that go by while what follows is computed, layer by layer.
        layers: of the model; the first one's pages are waited for in any case.
        prefetch_pages: that may be fetched ahead and be unused; 0 fetches nothing ahead.
    """

    pages: int
    call: float
    page: float
    copy: float = 0.0
    hidden: float = 0.0
    layers: int = 1
    prefetch_pages: int = 0

    def prices(self, token: float, pair: float) -> Prices:
        """What cores go by.

        Args:
            token: seconds to compute a token.
            pair: seconds to attend, for half of a square of positions.
        """
        return Prices(token, pair, {SHARED: self.call}, {SHARED: self.page + self.copy})


class SimStore:
    """The tier, for all workers of a server.

    Attributes:
        read_pages: that were read; of these `early_pages` before anybody asked.
        busy_seconds: time of reading.
    """

    def __init__(self, clock: Clock, spec: StoreSpec):
        self.spec = spec
        self.clock = clock
        self.read_pages = 0
        self.early_pages = 0
        self.busy_seconds = 0.0
        self._pages: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._free = 0.0

    def find(self, keys: list[bytes]) -> int:
        """How many of the first pages are there."""
        for count, key in enumerate(keys):
            if key not in self._pages:
                return count
        return len(keys)

    def read(self, load: Load, now: float) -> tuple[float, str | None]:
        """When a load is there, and what was wrong."""
        seconds = self.spec.call + self.spec.page * len(load.keys)
        self._free = max(self._free, now) + seconds
        self.busy_seconds += seconds
        self.read_pages += len(load.keys)
        self.early_pages += len(load.keys) if load.ahead else 0
        wrong = [k for k, t in zip(load.keys, load.tokens, strict=True) if self._pages.get(k) != t]
        for key in load.keys:
            self.touch(key)
        hidden = 0.0 if load.ahead else min(self.spec.hidden, seconds * (1 - 1 / self.spec.layers))
        return max(self._free - hidden, now), "a page has gone" if wrong else None

    def write(self, key: bytes, tokens: tuple[int, ...]) -> None:
        """Takes a page."""
        self._pages[key] = tokens
        self._pages.move_to_end(key)
        while len(self._pages) > self.spec.pages:
            self._pages.popitem(last=False)

    def touch(self, key: bytes) -> bool:
        """Notes that a page was used; False if it is not there."""
        if key in self._pages:
            self._pages.move_to_end(key)
        return key in self._pages


class SimStoreEnd:
    """A worker's end; `send` carries a message to the worker, now."""

    def __init__(self, store: SimStore, send: Callable[[m.Message], None]):
        self._store = store
        self._send = send

    def run(self, plan: StorePlan, now: float) -> float:
        """Begins what a plan says; seconds of the processor that it takes."""
        store, spec = self._store, self._store.spec
        for look in plan.looks:
            self._at(now, m.Looked(look.id, [SHARED] * store.find(look.keys)))
        for load in plan.loads:
            end, wrong = store.read(load, now)
            self._at(end, m.Loaded(load.transfer, wrong))
        if plan.saves:
            keys = [save.key for save in plan.saves]
            for save in plan.saves:
                store.write(save.key, save.tokens)
            self._at(now + spec.page * len(keys), m.Stored(keys, keys, []))
        gone = [key for key in plan.touched if not store.touch(key)]
        if gone:
            self._at(now, m.Stored([], [], gone))
        copied = len(plan.saves) + sum(len(commit.pages) for commit in plan.commits)
        return spec.copy * copied

    def _at(self, time: float, message: m.Message) -> None:
        self._store.clock.at(time, lambda: self._send(message))
