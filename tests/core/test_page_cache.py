from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState, block_keys, root_key

PAGE, NUM_PAGES = 2, 9
ROOTS = [root_key("base", ""), root_key("base", "tenant"), root_key("isolated", "")]


def fill(cache: PageCache, tokens: list[int], root: bytes = ROOTS[0]) -> list[int]:
    """Takes pages for `tokens` as an engine does: what is indexed is shared, the rest is new."""
    keys = block_keys(root, tokens, PAGE)
    nodes = cache.match(keys, tokens)
    pages = [node.page for node in nodes]
    fresh = cache.allocate(len(keys) - len(nodes))
    if fresh is None:
        cache.release(pages)
        raise MemoryError
    parent = nodes[-1] if nodes else None
    for i, page in enumerate(fresh, start=len(nodes)):
        block = tuple(tokens[i * PAGE : (i + 1) * PAGE])
        parent = Node(parent, keys[i - 1] if i else root, page, block, ["m"] * PAGE, keys[i])
        cache.insert(parent)
    return pages + fresh


class Machine(RuleBasedStateMachine):
    """Sequences come and go at random; a plain model says which pages may be handed out.

    `contents` is what was last written to each page: an indexed page that is matched must still
    hold what the index says, in the namespace it was asked for.
    """

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PageCache(NUM_PAGES, PAGE)
        self.held: Counter[int] = Counter()
        self.contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    @rule(
        target=sequences,
        tokens=st.lists(st.integers(0, 1), min_size=2, max_size=12),
        root=st.sampled_from(ROOTS),
    )
    def take(self, tokens: list[int], root: bytes) -> list[int]:
        keys = block_keys(root, tokens, PAGE)
        matched = self.cache.matched_tokens(keys, tokens) // PAGE
        used = sum(count > 0 for count in self.held.values())
        before = dict(self.held)
        try:
            pages = fill(self.cache, tokens, root)
        except MemoryError:
            # Everything that nobody holds could have been had.
            assert used + len(keys) > NUM_PAGES - 1
            return []
        for i, page in enumerate(pages):
            content = (root, tuple(tokens[: (i + 1) * PAGE]))
            if i < matched:
                assert self.contents[page] == content
            else:
                assert before.get(page, 0) == 0, "a page in use was handed out"
                self.contents[page] = content
            self.held[page] += 1
        return pages

    @rule(target=sequences, count=st.integers(0, 3))
    def grow(self, count: int) -> list[int]:
        """Private pages, which are never indexed."""
        used = sum(n > 0 for n in self.held.values())
        pages = self.cache.allocate(count)
        if pages is None:
            assert used + count > NUM_PAGES - 1
            return []
        for page in pages:
            assert self.held[page] == 0, "a page in use was handed out"
            self.held[page] += 1
            self.contents.pop(page, None)
        return pages

    @rule(pages=consumes(sequences))
    def drop(self, pages: list[int]) -> None:
        self.cache.release(pages)
        for page in pages:
            self.held[page] -= 1

    @rule(pages=sequences, seconds=st.integers(0, 9))
    def pin(self, pages: list[int], seconds: int) -> None:
        self.cache.pin(pages, self.cache.now + seconds)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.cache.tick(self.cache.now + seconds)

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check()
        counts = self.cache.counts()
        assert counts.total == NUM_PAGES - 1
        assert counts.used == sum(count > 0 for count in self.held.values())
        assert counts.shared == sum(count > 1 for count in self.held.values())
        assert self.cache.num_available == counts.total - counts.used

    @invariant()
    def no_page_is_pinned_whose_beginning_is_not(self) -> None:
        pins = self.cache._pins
        assert len(pins) <= (NUM_PAGES - 1) // 2
        assert all(n.parent is None or n.parent in pins for n in pins._until)

    @invariant()
    def what_is_not_pinned_goes_first(self) -> None:
        index = self.cache._index
        victim = index.least_recent()
        assert (victim in self.cache._pins) == (not index._unused and victim is not None)

    def teardown(self) -> None:
        for page, count in self.held.items():
            for _ in range(count):
                self.cache.release([page])


TestPageCache = Machine.TestCase
TestPageCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_used_last_is_evicted_last() -> None:
    cache = PageCache(7, PAGE)
    chains = [[i, i, i, i] for i in range(3)]
    for chain in chains:
        cache.release(fill(cache, chain))
    cache.release(fill(cache, chains[0]))
    held = cache.allocate(2)
    assert held is not None

    def indexed() -> list[int]:
        return [cache.matched_tokens(block_keys(ROOTS[0], c, PAGE), c) for c in chains]

    assert indexed() == [4, 0, 4], "the least recently used chain is gone"
    cache.allocate(1)
    assert indexed() == [4, 0, 2], "the next one has lost its leaf"
    assert cache.counts().cached == 3


def test_the_end_of_a_chain_is_the_first_to_be_looked_at() -> None:
    """Of a thousand pages that are not leaves none is passed over again and again."""
    cache = PageCache(7, PAGE)
    first, second = fill(cache, [1] * 6), fill(cache, [2] * 6)
    cache.release(second)
    cache.release(first)
    assert [node.page for node in cache._index._unused] == [*second[::-1], *first[::-1]]


def test_allocate_is_all_or_nothing() -> None:
    cache = PageCache(5, PAGE)
    cache.release(fill(cache, [1, 1, 2, 2]))
    held = cache.allocate(1)
    assert held is not None
    assert cache.allocate(4) is None
    assert cache.matched_tokens(block_keys(ROOTS[0], [1, 1, 2, 2], PAGE), [1, 1, 2, 2]) == 4
    assert cache.allocate(3) is not None
    assert cache.allocate(0) == []


def test_namespaces_share_nothing() -> None:
    cache = PageCache(9, PAGE)
    tokens = [1, 2, 3, 4]
    pages = [fill(cache, tokens, root) for root in ROOTS]
    assert len({page for run in pages for page in run}) == 6
    assert fill(cache, tokens, ROOTS[1]) == pages[1]
    assert cache.counts().shared == 2


def test_check_idle_notices_a_leak() -> None:
    cache = PageCache(4, PAGE)
    pages = fill(cache, [1, 2])
    cache.check()
    with pytest.raises(AssertionError, match="1 pages are held"):
        cache.check(idle=True)
    cache.release(pages)
    cache.check(idle=True)


def test_a_partly_filled_page_is_extended() -> None:
    cache = PageCache(4, 4)
    pages = cache.allocate(1)
    assert pages is not None
    node = Node(None, ROOTS[0], pages[0], (1, 2), ["a", "a"])
    cache.insert(node)
    assert cache.best_child(ROOTS[0], [1, 2, 3]) == (node, 2)
    key = block_keys(ROOTS[0], [1, 2, 3, 4], 4)[0]
    cache.extend(node, (1, 2, 3, 4), ["b", "b"], key)
    assert node.origins == ["a", "a", "b", "b"]
    assert cache.match([key], [1, 2, 3, 4]) == [node]
    assert cache.node_of(pages[0]) is node
    cache.release(pages)
    cache.release(pages)
    cache.check(idle=True)


def test_a_page_that_never_came_leaves_the_index_and_is_free_once_released() -> None:
    cache = PageCache(4, PAGE)
    pages = fill(cache, [1, 2, 3, 4])
    parent, leaf = (cache.node_of(page) for page in pages)
    assert parent is not None
    assert leaf is not None
    keys = block_keys(ROOTS[0], [1, 2, 3, 4], PAGE)
    cache.changes()
    cache.forget(leaf)
    assert leaf.state is PageState.FAILED
    assert cache.changes() == ([], [leaf.key])
    assert cache.matched_tokens(keys, [1, 2, 3, 4]) == 2
    cache.release(pages)
    cache.check(idle=True)
    assert cache.counts().cached == 1


def test_pages_that_follow_one_that_never_came_leave_with_it() -> None:
    cache = PageCache(4, PAGE)
    pages = fill(cache, [1, 2, 3, 4])
    parent = cache.node_of(pages[0])
    assert parent is not None
    cache.forget(parent)
    assert cache.matched_tokens(block_keys(ROOTS[0], [1, 2, 3, 4], PAGE), [1, 2, 3, 4]) == 0
    cache.release(pages)
    cache.check(idle=True)
    assert cache.counts().free == 3


def test_changes_of_the_index_are_told_once() -> None:
    cache = PageCache(3, PAGE)
    first, second = [1, 1, 2, 2], [3, 3, 4, 4]
    cache.release(fill(cache, first))
    assert cache.changes() == (block_keys(ROOTS[0], first, PAGE), [])
    assert cache.changes() == ([], [])
    cache.release(fill(cache, second))
    added, removed = cache.changes()
    assert added == block_keys(ROOTS[0], second, PAGE)
    assert sorted(removed) == sorted(block_keys(ROOTS[0], first, PAGE))
