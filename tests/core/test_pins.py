"""Pinned pages: what outlives what, for how long, and how many may be."""

from __future__ import annotations

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import block_keys
from tests.core.test_page_cache import PAGE, ROOTS, fill

CHAINS = [[i, i, i, i, i, i] for i in range(5)]


def indexed(cache: PageCache) -> list[int]:
    """Pages of each chain that are still found."""
    return [len(cache._find(block_keys(ROOTS[0], c, PAGE), c)) for c in CHAINS]


def filled(num_pages: int, chains: int, share: float = 0.5) -> PageCache:
    """A cache that has seen some chains of three pages, all released, the first longest ago."""
    cache = PageCache(num_pages, PAGE, share)
    for chain in CHAINS[:chains]:
        cache.release(fill(cache, chain))
    return cache


def pin(cache: PageCache, chain: int, until: float) -> None:
    """What the index holds of a chain is pinned, as when a call of a session ends."""
    pages = fill(cache, CHAINS[chain])
    cache.pin(pages, until)
    cache.release(pages)


def test_a_pinned_chain_outlives_those_that_were_used_later() -> None:
    cache = filled(13, 4)
    pin(cache, 0, 60.0)
    for chain in (1, 2, 3):
        cache.release(fill(cache, CHAINS[chain]))
    assert cache.allocate(9) is not None
    assert indexed(cache) == [3, 0, 0, 0, 0]
    assert cache.num_pinned == 3


def test_pins_end_when_their_time_is_over_and_their_pages_go_first() -> None:
    cache = filled(13, 4)
    pin(cache, 3, 60.0)
    cache.tick(59.0)
    assert cache.num_pinned == 3
    cache.tick(60.0)
    assert cache.num_pinned == 0
    cache.allocate(2)
    assert indexed(cache) == [3, 3, 3, 1, 0]


def test_a_longer_pin_is_not_cut_by_a_shorter_one() -> None:
    cache = filled(13, 1)
    pin(cache, 0, 60.0)
    pin(cache, 0, 10.0)
    cache.tick(30.0)
    assert cache.num_pinned == 3
    cache.tick(61.0)
    assert cache.num_pinned == 0


def test_whoever_needs_a_page_gets_it_though_all_are_pinned() -> None:
    cache = filled(13, 4, share=1.0)
    for chain in range(4):
        pin(cache, chain, 60.0)
    assert cache.num_pinned == 12
    assert cache.num_available == 12
    assert cache.allocate(4) is not None
    assert indexed(cache) == [0, 2, 3, 3, 0], "least recently pinned first, from the end"
    assert cache.num_pinned == 8


def test_those_who_are_to_spare_pinned_pages_get_the_others_only() -> None:
    cache = filled(10, 3)
    pin(cache, 0, 60.0)
    assert cache.allocate(7, spare_pinned=True) is None
    assert indexed(cache)[0] == 3
    assert cache.allocate(6, spare_pinned=True) is not None


def test_no_more_than_a_share_is_pinned_and_the_latest_are() -> None:
    cache = filled(17, 5, share=0.25)
    for chain in range(3):
        pin(cache, chain, 60.0 - chain)
    assert cache.num_pinned == 4
    for chain in (3, 4):
        cache.release(fill(cache, CHAINS[chain]))
    cache.allocate(12)
    # Of the chain before, the beginning: its end is of no use without it.
    assert indexed(cache) == [0, 1, 3, 0, 0]


def test_a_chain_that_is_longer_than_the_share_is_pinned_from_its_beginning() -> None:
    cache = filled(9, 2, share=0.25)
    pin(cache, 0, 60.0)
    cache.release(fill(cache, CHAINS[1]))
    cache.allocate(6)
    assert indexed(cache) == [2, 0, 0, 0, 0]


def test_pins_of_nothing_and_of_the_past_are_none() -> None:
    cache = filled(9, 1)
    cache.tick(10.0)
    pin(cache, 0, 10.0)
    cache.pin([], 60.0)
    private = cache.allocate(1)
    assert private is not None
    cache.pin(private, 60.0)
    assert cache.num_pinned == 0
