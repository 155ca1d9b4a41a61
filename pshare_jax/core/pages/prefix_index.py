"""From token blocks to the pages that hold their KV.

Full pages are found by a chained hash of their tokens: key_i = H(key_{i-1}, tokens_i), where key_0
names the weights that wrote the KV and the tenant, never the model that asked. A hit is
verified by comparing the tokens. The half-filled last page of a prompt hangs below its last full
page and is found by comparing tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

SIBLINGS_COMPARED = 32
"""Newest children that are compared when looking for a partly matching page."""


def root_key(fingerprint: str, cache_salt: str) -> bytes:
    """The key that a chain starts from: the weights that write the KV, and the tenant."""
    head = hashlib.blake2b(fingerprint.encode(), digest_size=16).digest()
    return hashlib.blake2b(head + cache_salt.encode(), digest_size=16).digest()


def block_keys(root: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Chained keys of all full blocks of `page_size` tokens."""
    keys: list[bytes] = []
    key = root
    for end in range(page_size, len(tokens) + 1, page_size):
        key = block_key(key, tokens[end - page_size : end])
        keys.append(key)
    return keys


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block `tokens` that follows the block of key `parent`."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading elements that are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class PageState(Enum):
    """Whether a page's contents are there. A page that is not indexed is absent."""

    ARRIVING = "arriving"
    READY = "ready"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Node:
    """One indexed page.

    `key` is None while the page is only partly filled. `origins` names, for each token, the model
    whose request had it computed. `filler` is the id of the sequence that brings the contents of a
    page that is arriving. A page that is `extending` is being filled further in place. `ahead` are
    tokens that were computed before anybody asked for them, and that nobody has used yet; a page
    that was fetched `early` is one that came from the KV store so. One that was `borrowed` may have
    been computed by other kernels or other code.
    """

    parent: Node | None
    parent_key: bytes
    page: int
    tokens: tuple[int, ...]
    origins: list[str]
    key: bytes | None = None
    state: PageState = PageState.READY
    filler: int | None = None
    extending: bool = False
    num_children: int = 0
    ahead: set[int] = field(default_factory=set[int])
    early: bool = False
    borrowed: bool = False

    def use(self, length: int) -> int:
        """Somebody uses the first `length` tokens; how many of them were waiting for that."""
        used = {index for index in self.ahead if index < length}
        self.ahead -= used
        return len(used)


@dataclass(slots=True)
class _Children:
    """Children of one key, by first token; newest last."""

    by_first_token: dict[int, dict[Node, None]] = field(default_factory=dict[int, dict[Node, None]])

    def add(self, node: Node) -> None:
        self.by_first_token.setdefault(node.tokens[0], {})[node] = None

    def remove(self, node: Node) -> None:
        siblings = self.by_first_token[node.tokens[0]]
        del siblings[node]
        if not siblings:
            del self.by_first_token[node.tokens[0]]

    def newest(self, first_token: int) -> Iterator[Node]:
        siblings = self.by_first_token.get(first_token, {})
        return itertools.islice(reversed(siblings), SIBLINGS_COMPARED)


class PrefixIndex:
    """The nodes of one pool, with the order in which unused leaves may be evicted."""

    def __init__(self) -> None:
        self._full: dict[bytes, Node] = {}
        self._children: dict[bytes, _Children] = {}
        self._by_page: dict[int, Node] = {}
        self._unused: OrderedDict[Node, None] = OrderedDict()
        self._pinned: OrderedDict[Node, None] = OrderedDict()
        self.added: list[bytes] = []
        """Keys that have entered since somebody last looked, see `PageCache.changes`."""
        self.removed: list[bytes] = []

    def __len__(self) -> int:
        return len(self._by_page)

    def node_of(self, page: int) -> Node | None:
        """The node that holds `page`."""
        return self._by_page.get(page)

    def newest(self, count: int) -> list[Node]:
        """The pages that were indexed last, newest first."""
        # One call of the interpreter's own code, which other threads do not interrupt.
        return list(itertools.islice(reversed(self._by_page.values()), count))

    def keys(self) -> list[bytes]:
        """Keys of all full pages."""
        return list(self._full)

    def has(self, key: bytes) -> bool:
        """Whether a full page of that key is indexed."""
        return key in self._full

    def is_arriving(self, key: bytes) -> bool:
        """Whether a full page of that key is on its way."""
        node = self._full.get(key)
        return node is not None and node.state is PageState.ARRIVING

    def get(self, key: bytes, tokens: Sequence[int]) -> Node | None:
        """The full page of chain key `key`, if its tokens are really `tokens`.

        A page that has failed is never given.
        """
        node = self._full.get(key)
        if node is None or node.state is PageState.FAILED or node.tokens != tuple(tokens):
            return None
        return node

    def best_child(self, parent_key: bytes, tokens: Sequence[int]) -> tuple[Node, int] | None:
        """The child page that starts with most of `tokens`, and how many; None when none does."""
        children = self._children.get(parent_key)
        if children is None or not tokens:
            return None
        best: tuple[Node, int] | None = None
        for node in children.newest(tokens[0]):
            length = common_prefix(node.tokens, tokens)
            if node.state is PageState.READY and (best is None or length > best[1]):
                best = (node, length)
        return best

    def followers(self, node: Node) -> list[Node]:
        """The pages that follow a full page."""
        children = self._children.get(node.key) if node.key is not None else None
        if children is None:
            return []
        return [child for siblings in children.by_first_token.values() for child in siblings]

    def insert(self, node: Node) -> None:
        """Adds a page, which must not be indexed; nor may another full page of its key be."""
        assert node.page not in self._by_page, f"page {node.page} is indexed already"
        self._by_page[node.page] = node
        if node.key is not None:
            self.complete(node, node.key)
        self._children.setdefault(node.parent_key, _Children()).add(node)
        if node.parent is not None:
            node.parent.num_children += 1

    def complete(self, node: Node, key: bytes) -> None:
        """Gives a page that has become full its key, under which no other page may be indexed."""
        assert key not in self._full, "a full page of this key is indexed already"
        node.key = key
        self._full[key] = node
        self.added.append(key)

    def offer(self, node: Node, *, pinned: bool = False) -> None:
        """Says that nothing references the node's page any more: it may be evicted as a leaf.

        One that is pinned goes after all others that are not.
        """
        (self._pinned if pinned else self._unused)[node] = None

    def withdraw(self, node: Node) -> None:
        """Says that the node's page is referenced (again)."""
        self._unused.pop(node, None)
        self._pinned.pop(node, None)

    def pin(self, node: Node) -> None:
        """Has a page, if nothing references it, be evicted after those that are not pinned."""
        if self._unused.pop(node, self) is None:
            self._pinned[node] = None

    def unpin(self, node: Node) -> None:
        """Has a page that was pinned in vain be the next to be evicted."""
        if self._pinned.pop(node, self) is None:
            self._unused[node] = None
            self._unused.move_to_end(node, last=False)

    def remove(self, node: Node) -> None:
        """Takes a leaf out of the index."""
        assert node.num_children == 0, "only leaves are removed"
        self.withdraw(node)
        if node.key is not None:
            del self._full[node.key]
            self.removed.append(node.key)
        del self._by_page[node.page]
        children = self._children[node.parent_key]
        children.remove(node)
        if not children.by_first_token:
            del self._children[node.parent_key]
        if node.parent is not None:
            node.parent.num_children -= 1

    def least_recent(self, *, pinned: bool = True) -> Node | None:
        """The unused leaf that was offered longest ago; a pinned one last, and only if `pinned`.

        Chains are released from their end, so that leaves come first and this rarely scans.
        """
        order = itertools.chain(self._unused, self._pinned if pinned else ())
        return next((node for node in order if node.num_children == 0), None)

    @property
    def num_unused(self) -> int:
        """Indexed pages that nothing references; all of them can be evicted, leaves first."""
        return len(self._unused) + len(self._pinned)
