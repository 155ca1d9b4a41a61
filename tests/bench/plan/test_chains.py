"""The page book of chains: by hand, and against the engine's own page cache."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.bench.plan.chains import ChainPool
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, block_keys, root_key

PAGE = 4


def cover(pool: ChainPool, key: str, tokens: int, model: int = 0) -> int | None:
    """Covers a prompt and lets go of it; tokens that were cached, or None when there is no room."""
    cached = min(pool.tokens(key), tokens)
    lease = pool.hold(key, pool.pages_for(cached))
    if not pool.allocate(lease, pool.pages_for(tokens) - lease.pages):
        pool.release(lease)
        return None
    pool.extend(lease, tokens, model)
    pool.release(lease)
    return cached


def test_the_least_recently_used_chain_loses_its_end():
    pool = ChainPool(11, PAGE)
    assert cover(pool, "a", 16) == 0
    assert cover(pool, "b", 16) == 0
    assert cover(pool, "a", 16) == 16  # b is older now
    assert cover(pool, "c", 16) == 0  # 4 pages, 2 were free: b keeps 2
    assert (pool.tokens("a"), pool.tokens("b"), pool.tokens("c")) == (16, 8, 16)
    assert cover(pool, "d", 20) == 0  # b's last two, then three of a's
    assert (pool.tokens("a"), pool.tokens("b"), pool.tokens("c")) == (4, 0, 16)


def test_held_pages_are_not_evicted():
    pool = ChainPool(9, PAGE)
    cover(pool, "a", 16)
    lease = pool.hold("a", 3)
    other = pool.hold("b", 0)
    assert pool.num_available == 5
    assert not pool.allocate(other, 6)
    assert pool.allocate(other, 5)
    assert pool.tokens("a") == 12
    assert pool.num_used == 8
    pool.release(other)
    pool.release(lease)
    assert (pool.num_available, pool.num_used) == (8, 0)


def test_tokens_know_who_had_them_computed():
    pool = ChainPool(9, PAGE)
    cover(pool, "a", 10, model=0)
    cover(pool, "a", 15, model=1)
    assert pool.origins("a", 13) == Counter({0: 10, 1: 3})
    lease = pool.hold("b", 0)
    pool.allocate(lease, 6)  # leaves two of a's four pages
    assert pool.origins("a", pool.tokens("a")) == Counter({0: 8})


class Engine:
    """What a sequence does with the engine's page cache, in full pages of one chain a session."""

    def __init__(self, num_pages: int):
        self.cache = PageCache(num_pages, PAGE)

    def cover(self, session: int, tokens: int) -> int | None:
        prompt = [session * 1000 + i for i in range(tokens)]
        keys = block_keys(root_key(str(session), ""), prompt, PAGE)
        matched = self.cache.match(keys, prompt)
        fresh = self.cache.allocate(len(keys) - len(matched))
        if fresh is None:
            self.cache.release(node.page for node in matched)
            return None
        pages = [node.page for node in matched] + fresh
        parent = matched[-1] if matched else None
        for i in range(len(matched), len(keys)):
            block = prompt[i * PAGE : (i + 1) * PAGE]
            before = keys[i - 1] if i else b"root"
            parent = Node(parent, before, pages[i], block, ["m"] * PAGE, keys[i])
            self.cache.insert(parent)
        self.cache.release(pages)
        return len(matched) * PAGE


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=40))
def test_it_remembers_what_the_engines_cache_remembers(calls):
    engine, pool, lengths = Engine(14), ChainPool(14, PAGE), Counter()
    for session, growth in calls:
        lengths[session] += growth * PAGE
        found = engine.cover(session, lengths[session])
        assert cover(pool, str(session), lengths[session]) == found
        assert pool.num_available == engine.cache.num_available
