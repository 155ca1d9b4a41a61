"""The sharing map: pages of all pools as contexts, who computed them and who reads them."""

from __future__ import annotations

import itertools

from pshare_jax.core.pages import sharing_map as module
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState, block_keys, root_key
from pshare_jax.core.pages.sharing_map import sharing_map

SIZE = 4
ROOT = root_key("base", "")


def hold(cache: PageCache, tokens: list[int], origins: str, state=PageState.READY) -> list[int]:
    """Indexes the pages of `tokens` that are not yet; gives all of them, referenced.

    `origins` has a letter for each token, or none.
    """
    keys = block_keys(ROOT, tokens, SIZE)
    nodes = cache.match(keys, tokens)
    for start in range(len(nodes) * SIZE, len(tokens), SIZE):
        (page,) = cache.allocate(1)
        number = start // SIZE
        node = Node(
            parent=nodes[-1] if nodes else None,
            parent_key=nodes[-1].key if nodes else ROOT,
            page=page,
            tokens=tuple(tokens[start : start + SIZE]),
            origins=list(origins[start : start + SIZE]),
            key=keys[number] if number < len(keys) else None,
            state=state,
        )
        cache.insert(node)
        nodes.append(node)
    return [node.page for node in nodes]


def pages(context) -> list[tuple]:
    return [(p.tokens, p.computed_by, p.readers, p.pools) for p in context.pages]


def test_nothing():
    assert sharing_map({}, {}).contexts == []
    empty = sharing_map({"prefill0": PageCache(8, SIZE)}, {})
    assert (empty.page_size, empty.contexts, empty.hidden) == (SIZE, [], 0)


def test_one_context_of_two_pools_and_two_readers():
    prefill, decode = PageCache(8, SIZE), PageCache(8, SIZE)
    tokens = list(range(10))
    hold(prefill, tokens, "aaaaaabbbb")
    held = hold(decode, tokens[:8], "")
    readers = {"decode0": [("b", held), ("a", held[:1]), ("b", held)]}
    (context,) = sharing_map({"prefill0": prefill, "decode0": decode}, readers).contexts
    assert (context.parent, context.start) == ("", 0)
    both = ["decode0", "prefill0"]
    assert pages(context) == [
        (4, [("a", 4)], ["a", "b"], both),
        (4, [("a", 2), ("b", 2)], ["b"], both),
        (2, [("b", 2)], [], ["prefill0"]),
    ]


def test_branches_follow_what_they_continue():
    cache = PageCache(16, SIZE)
    hold(cache, [0, 1, 2, 3, 4, 5, 6, 7, 8], "aaaaaaaaa")
    hold(cache, [0, 1, 2, 3, 9, 9, 9, 9], "aaaabbbb")
    hold(cache, [5, 5], "cc")
    stem, first, second, other = sharing_map({"prefill0": cache}, {}).contexts
    assert [len(c.pages) for c in (stem, first, second, other)] == [1, 2, 1, 1]
    assert [(c.parent, c.start) for c in (first, second)] == [(stem.id, 1)] * 2
    assert (other.parent, other.start) == ("", 0)
    assert pages(second) == [(4, [("b", 4)], [], ["prefill0"])]
    assert len({c.id for c in (stem, first, second, other)}) == 4


def test_a_pool_of_both_workers_is_read_once():
    cache = PageCache(8, SIZE)
    held = hold(cache, [1, 2, 3, 4], "aaaa")
    found = sharing_map({"prefill0": cache, "decode0": cache}, {"decode0": [("b", held)]})
    assert pages(found.contexts[0]) == [(4, [("a", 4)], ["b"], ["prefill0"])]


def test_pages_on_their_way():
    decode = PageCache(8, SIZE)
    hold(decode, [1, 2, 3, 4], "", PageState.ARRIVING)
    (context,) = sharing_map({"decode0": decode}, {}).contexts
    (page,) = context.pages
    assert (page.arriving, page.computed_by) == (True, [])


def test_pages_of_sequences_that_are_not_indexed_are_left_out():
    cache = PageCache(8, SIZE)
    assert sharing_map({"decode0": cache}, {"decode0": [("a", cache.allocate(2))]}).contexts == []


def test_of_many_pages_the_newest_are_shown(monkeypatch):
    monkeypatch.setattr(module, "MAX_PAGES", 3)
    cache = PageCache(16, SIZE)
    for first in range(5):
        hold(cache, [first] * 4, "aaaa")
    found = sharing_map({"prefill0": cache}, {})
    assert (len(found.contexts), found.hidden) == (3, 2)


def test_names_tell_nothing_of_the_tokens(monkeypatch):
    cache = PageCache(8, SIZE)
    hold(cache, [1, 2, 3, 4], "aaaa")

    def name() -> str:
        return sharing_map({"prefill0": cache}, {}).contexts[0].id

    first = name()
    assert name() == first
    monkeypatch.setattr(module, "_SECRET", b"another process")
    assert name() != first


def test_a_long_context_is_no_deep_recursion():
    cache = PageCache(module.MAX_PAGES, SIZE)
    tokens = list(itertools.islice(itertools.cycle(range(50)), SIZE * (module.MAX_PAGES - 1)))
    hold(cache, tokens, "a" * len(tokens))
    (context,) = sharing_map({"prefill0": cache}, {}).contexts
    assert len(context.pages) == module.MAX_PAGES - 1


def test_pages_that_the_store_has_name_its_tiers():
    cache = PageCache(8, SIZE)
    hold(cache, list(range(10)), "aaaaaaaaaa")
    keys = block_keys(ROOT, list(range(10)), SIZE)
    asked = []

    def held(some):
        asked.append(list(some))
        return {"shared": [True, True], "disk": [key == keys[0] for key in some]}

    (context,) = sharing_map({"prefill0": cache}, {}, held).contexts
    assert [page.tiers for page in context.pages] == [["shared", "disk"], ["shared"], []]
    # A page that is not full has no key.
    assert asked == [keys]
    assert sharing_map({"prefill0": PageCache(8, SIZE)}, {}, held).contexts == []
    assert len(asked) == 1


def test_the_map_of_several_processes_is_that_of_one():
    """Made of what each tells of its own pools; what is partly full tells no token."""
    prefill, decode = PageCache(16, SIZE), PageCache(16, SIZE)
    hold(prefill, [0, 1, 2, 3, 4, 5, 6, 7, 8], "aaaaaabbb")
    hold(prefill, [0, 1, 2, 3, 9, 9, 9, 9], "aaaabbbb")
    held = hold(decode, [0, 1, 2, 3, 4, 5, 6, 7], "")
    readers = {"decode0": [("b", held), ("a", held[:1])]}
    whole = sharing_map({"prefill0": prefill, "decode0": decode}, readers)
    views = [
        *module.pool_views({"prefill0": prefill}, {}),
        *module.pool_views({"decode0": decode}, readers),
    ]
    found = module.map_of(views, SIZE)
    assert [c.pages for c in found.contexts] == [c.pages for c in whole.contexts]
    assert [c.start for c in found.contexts] == [c.start for c in whole.contexts]
    assert not any(b"(8,)" in page.key for view in views for page in view.pages)
    both = {"prefill0": prefill, "decode0": prefill}
    assert [view.worker for view in module.pool_views(both, {})] == ["prefill0"]
