"""Which contexts the pools hold, who computed each page of them, and who reads it now.

A view for people: it is made from another thread than those that own the pools, without stopping
them. Each list is copied at once, so the map is whole, but a page may be a moment older than the
next; it holds no token and no text.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState

MAX_PAGES = 2048
"""Pages of a map at the most: of each pool, those that were indexed last."""

_SECRET = secrets.token_bytes(16)
"""Names are made with it: a page's key alone would let others test what a prompt may have been."""

Reader = tuple[str, Sequence[int]]
"""A model, and the pages of a pool that a sequence of it holds."""


class MapPage(msgspec.Struct, array_like=True, frozen=True):
    """One page of a context.

    Args:
        tokens: how many it holds.
        computed_by: runs of tokens and the model whose request had them computed, in order; empty
            where that is no longer known.
        readers: models of running sequences that hold it, sorted.
        pools: workers in whose pools it lies, sorted; the first of those that share one.
        arriving: whether its contents are still on their way to a pool.
        tiers: of the KV store that have it, too; nearest first.
    """

    tokens: int
    computed_by: list[tuple[str, int]]
    readers: list[str]
    pools: list[str]
    arriving: bool
    tiers: list[str] = []


class MapContext(msgspec.Struct, frozen=True):
    """Pages that follow each other without a branch.

    Args:
        id: stays the same while its first page stays as it is.
        parent: the context that it continues; empty for one that begins a prompt.
        start: pages that come before it in its prompt.
        pages: in order.
    """

    id: str
    parent: str
    start: int
    pages: list[MapPage]


class SharingMap(msgspec.Struct, frozen=True):
    """Contexts, each after its parent; `page_size` is in tokens.

    `hidden` counts indexed pages that are not shown, see `MAX_PAGES`.
    """

    page_size: int
    contexts: list[MapContext]
    hidden: int = 0


class SeenPage(msgspec.Struct, array_like=True, frozen=True):
    """A page of one pool, for a map that is made elsewhere.

    Args:
        key: of its contents and all before them.
        parent: key of the page before it, or of where prompts begin.
        tokens: how many it holds.
        computed_by, readers, arriving, tiers: see `MapPage`.
    """

    key: bytes
    parent: bytes
    tokens: int
    computed_by: list[tuple[str, int]]
    readers: list[str]
    arriving: bool
    tiers: list[str]


class PoolView(msgspec.Struct, frozen=True):
    """What one pool holds, oldest page first; `worker` is the first of those that share it."""

    worker: str
    page_size: int
    pages: list[SeenPage]
    hidden: int


class _Block:
    """One page's contents, wherever they lie."""

    __slots__ = (
        "arriving",
        "children",
        "full",
        "key",
        "parent_key",
        "pools",
        "readers",
        "runs",
        "tiers",
        "tokens",
    )

    def __init__(self, key: bytes, parent_key: bytes, tokens: int, *, full: bool = True):
        self.key = key
        self.parent_key = parent_key
        self.tokens = tokens
        self.full = full
        self.runs: list[tuple[str, int]] = []
        self.readers: set[str] = set()
        self.pools: set[str] = set()
        self.arriving = False
        self.tiers: list[str] = []
        self.children: list[_Block] = []

    def page(self) -> MapPage:
        readers, pools = sorted(self.readers), sorted(self.pools)
        return MapPage(self.tokens, self.runs, readers, pools, self.arriving, self.tiers)

    def seen(self) -> SeenPage:
        # A key that is not full holds tokens, which nobody is to learn.
        key = self.key if self.full else hashlib.blake2b(self.key, digest_size=16).digest()
        return SeenPage(
            key,
            self.parent_key,
            self.tokens,
            self.runs,
            sorted(self.readers),
            self.arriving,
            self.tiers,
        )


Held = Callable[[Sequence[bytes]], Mapping[str, Sequence[bool]]]
"""Which pages each tier of the KV store has, by the pages' keys."""


def sharing_map(
    caches: Mapping[str, PageCache],
    readers: Mapping[str, Iterable[Reader]],
    held: Held | None = None,
) -> SharingMap:
    """The contexts of all pools as one map.

    Args:
        caches: page accounts by worker; workers may share one.
        readers: by worker, the sequences that run and the pages of its pool that they hold.
        held: of the KV store, if there is one.
    """
    blocks: dict[bytes, _Block] = {}
    hidden = _take_in(blocks, caches, readers, held)
    page_size = next(iter(caches.values())).page_size if caches else 0
    return SharingMap(page_size, _contexts(blocks), hidden)


def pool_views(
    caches: Mapping[str, PageCache],
    readers: Mapping[str, Iterable[Reader]],
    held: Held | None = None,
) -> list[PoolView]:
    """What the pools of one process hold; arguments as of `sharing_map`.

    Of several workers over one pool it is the first one's.
    """
    own: dict[int, list[str]] = {}
    for worker, cache in caches.items():
        own.setdefault(id(cache), []).append(worker)
    views: list[PoolView] = []
    for workers in own.values():
        blocks: dict[bytes, _Block] = {}
        hidden = _take_in(blocks, {name: caches[name] for name in workers}, readers, held)
        pages = [block.seen() for block in blocks.values()]
        views.append(PoolView(workers[0], caches[workers[0]].page_size, pages, hidden))
    return views


def map_of(views: Iterable[PoolView], page_size: int) -> SharingMap:
    """The contexts of the pools of several processes as one map."""
    blocks: dict[bytes, _Block] = {}
    hidden = 0
    for view in views:
        hidden += view.hidden
        for page in view.pages:
            block = blocks.get(page.key)
            if block is None:
                block = blocks[page.key] = _Block(page.key, page.parent, page.tokens)
            block.pools.add(view.worker)
            block.arriving |= page.arriving
            block.runs = block.runs or page.computed_by
            block.readers.update(page.readers)
            # Stores of several hosts may have it.
            block.tiers = list(dict.fromkeys([*block.tiers, *page.tiers]))
    return SharingMap(page_size, _contexts(blocks), hidden)


def _take_in(
    blocks: dict[bytes, _Block],
    caches: Mapping[str, PageCache],
    readers: Mapping[str, Iterable[Reader]],
    held: Held | None,
) -> int:
    """Adds what pools hold to `blocks`; gives the number of pages that are hidden."""
    pools: dict[int, dict[int, _Block]] = {}
    hidden = 0
    for worker, cache in caches.items():
        if id(cache) not in pools:
            nodes = cache.newest_nodes(MAX_PAGES)
            hidden += max(cache.num_indexed - len(nodes), 0)
            pools[id(cache)] = {n.page: _add(blocks, worker, n) for n in reversed(nodes)}
        by_page = pools[id(cache)]
        for model, pages in readers.get(worker, ()):
            for block in filter(None, map(by_page.get, tuple(pages))):
                block.readers.add(model)
    full = [block for block in blocks.values() if block.full]
    if held is not None and full:
        for tier, has in held([block.key for block in full]).items():
            for block, is_there in zip(full, has, strict=True):
                if is_there:
                    block.tiers.append(tier)
    return hidden


def _add(blocks: dict[bytes, _Block], worker: str, node: Node) -> _Block:
    # A page that is not full has no key: it is the only one at its place that begins so.
    key = node.key or node.parent_key + repr(node.tokens).encode()
    block = blocks.get(key)
    if block is None:
        full = node.key is not None
        block = blocks[key] = _Block(key, node.parent_key, len(node.tokens), full=full)
    block.pools.add(worker)
    block.arriving |= node.state is PageState.ARRIVING
    if not block.runs:
        same = itertools.groupby(list(node.origins))
        block.runs = [(name, len(list(run))) for name, run in same]
    return block


def _contexts(blocks: Mapping[bytes, _Block]) -> list[MapContext]:
    """Chains without branches, each after the one that it continues."""
    roots: list[_Block] = []
    for block in blocks.values():
        parent = blocks.get(block.parent_key)
        (roots if parent is None else parent.children).append(block)
    contexts: list[MapContext] = []
    # Not by recursion: a context may have thousands of pages.
    todo = [(root, "", 0) for root in reversed(roots)]
    while todo:
        block, parent, start = todo.pop()
        chain = [block]
        while len(chain[-1].children) == 1:
            chain.append(chain[-1].children[0])
        name = hashlib.blake2b(block.key, digest_size=8, key=_SECRET).hexdigest()
        contexts.append(MapContext(name, parent, start, [block.page() for block in chain]))
        end = start + len(chain)
        todo += [(child, name, end) for child in reversed(chain[-1].children)]
    return contexts
