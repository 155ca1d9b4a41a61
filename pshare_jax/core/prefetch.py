"""Pages that are fetched from the KV store before anybody asks for them.

A prompt that is expected is looked for and fetched in small pieces, one at a time, and only while
no prompts are here to be computed, nobody waits for the store, and nothing is left to be written to
it. So whoever asks meanwhile waits at the most for the piece that is on its way, and only if it
needs just that. What was fetched so and is not used yet stays within a budget; it leaves the pool
like all that nobody holds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pshare_jax.core import messages as m
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Look
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.write_behind import page_keys

if TYPE_CHECKING:
    from pshare_jax.core.store_client import StoreClient

MAX_EXPECTED = 256
"""Prompts that are expected; of more, those that were heard of first are forgotten."""

PIECE_SECONDS = 0.005
"""What a piece takes at the most, if it has more than one page."""

MAX_PIECE = 16
"""Pages of a piece."""

_RESERVE = 8
"""The part of the pool, one in so many pages, that is left to those who ask."""


@dataclass(eq=False)
class _Target:
    """A prompt that is expected: `places` of its pages from number `first` on, once they are known;
    all before page `begun` have been begun. One that `came` meanwhile is left alone."""

    sequence: Sequence
    first: int = 0
    places: list[int] = field(default_factory=list[int])
    begun: int = 0
    came: bool = False


class Prefetch:
    """What a prefill core fetches ahead.

    Args:
        client: its side of the store, which carries out what is decided here.
        cache: the core's pages.
        budget: most bytes that are fetched and not used.
        page_bytes: of a page in the pool.
    """

    def __init__(self, client: StoreClient, cache: PageCache, budget: int, page_bytes: int):
        self._client = client
        self._cache = cache
        self._max_pages = budget // page_bytes
        self._page_bytes = page_bytes
        self._expected: OrderedDict[bytes, _Target] = OrderedDict()
        self._looking: _Target | None = None
        self._current: _Target | None = None
        self._transfer: int | None = None
        self._unused: dict[Node, None] = {}

    @property
    def num_unused(self) -> int:
        """Pages that were fetched, or are on their way, and that nobody has used."""
        self._sweep()
        return len(self._unused)

    def expect(self, sequence: Sequence) -> None:
        """A prompt that begins like this one is expected."""
        key = sequence.last_key
        if self._current is not None and self._current.sequence.last_key == key:
            return
        if self._looking is not None and self._looking.sequence.last_key == key:
            return
        self._expected[key] = _Target(sequence)
        self._expected.move_to_end(key)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def asked(self, sequence: Sequence) -> None:
        """A prompt has come: what is lacking of it is fetched for it, and not ahead."""
        for target in (*self._expected.values(), self._looking, self._current):
            if target is not None and _same_beginning(target.sequence, sequence):
                target.came = True

    def looked(self, answer: m.Looked) -> bool:
        """Takes in an answer; False if it was not asked for here."""
        target = self._looking
        if target is None or target.sequence.id != answer.id:
            return False
        self._looking = None
        keys = page_keys(target.sequence, self._cache.page_size)[target.first :]
        self._client.behind.know(keys[: len(answer.places)])
        prices, page_size = self._client.prices, self._cache.page_size
        covered, first = target.sequence.covered, target.first
        ends = [min((first + i + 1) * page_size, covered) for i in range(len(answer.places))]
        count = prices.pages_to_fetch(answer.places, ends, first * page_size, covered, 0.0, 0.0)
        self._client.stats.declined += len(answer.places) - count
        if count and not target.came:
            target.places = answer.places[:count]
            self._current = target
        return True

    def work(self) -> Look | None:
        """Begins the next piece, or says what to look for; nobody waits for anything now."""
        if self._transfer is not None and self._client.is_fetching(self._transfer):
            return None
        self._transfer = None
        self._sweep()
        if self._current is not None and not self._current.came:
            self._transfer = self._next_piece(self._current)
            if self._transfer is not None:
                return None
        self._current = None
        if self._looking is not None or len(self._unused) >= self._max_pages:
            return None
        return self._next_look()

    def landed(self, nodes: list[Node]) -> None:
        """Pages that were fetched are there."""
        self._client.stats.early_bytes += len(nodes) * self._page_bytes

    def clear(self) -> None:
        """Forgets what is expected."""
        self._expected.clear()
        self._current = self._looking = None

    def _next_look(self) -> Look | None:
        while self._expected:
            _, target = self._expected.popitem(last=False)
            found = None if target.came else self._client.lacks(target.sequence)
            if found is not None:
                target.first, keys = found
                self._looking = target
                return Look(target.sequence.id, keys, ahead=True)
        return None

    def _next_piece(self, target: _Target) -> int | None:
        """The transfer of a target's next pages; None when it is done, or cannot go on now."""
        sequence, cache = target.sequence, self._cache
        matched = cache.match(sequence.keys, sequence.prompt)
        number = len(matched)
        places = target.places[number - target.first :] if number >= target.first else []
        room = min(
            self._max_pages - len(self._unused),
            cache.num_available - cache.num_usable // _RESERVE,
            MAX_PIECE,
        )
        count = self._count(places[: max(room, 0)])
        # Where a full page is missing that was begun, it has failed, or others took it.
        lost = number < min(target.begun, len(sequence.keys))
        done = target.begun >= target.first + len(target.places)
        fresh = None if lost or done or not count else cache.allocate(count, spare_pinned=True)
        if fresh is None:
            cache.release(node.page for node in matched)
            return None
        target.begun = number + count
        transfer, nodes = self._client.begin_early(sequence, matched, fresh, places[:count])
        self._unused.update(dict.fromkeys(nodes))
        return transfer

    def _count(self, places: list[int]) -> int:
        """How many pages make a piece."""
        count = min(len(places), 1)
        prices = self._client.prices
        while count < len(places) and prices.fetch(places[: count + 1]) <= PIECE_SECONDS:
            count += 1
        return count

    def _sweep(self) -> None:
        """Notes what has become of pages that were fetched."""
        stats = self._client.stats
        for node in list(self._unused):
            if not node.early:
                stats.early_used_bytes += self._page_bytes
            elif self._cache.node_of(node.page) is node:
                continue
            elif node.state is PageState.READY:
                stats.early_wasted_bytes += self._page_bytes
            del self._unused[node]


def _same_beginning(part: Sequence, whole: Sequence) -> bool:
    """Whether the full pages of a prompt are the first ones of another."""
    return whole.keys[: len(part.keys)] == part.keys
