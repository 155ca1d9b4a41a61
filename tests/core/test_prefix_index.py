from __future__ import annotations

import pytest

from pshare_jax.core.pages.prefix_index import (
    Node,
    PageState,
    PrefixIndex,
    block_key,
    block_keys,
    common_prefix,
    root_key,
)

ROOT = root_key("weights", "")
PAGE = 4


def node(page: int, tokens: list[int], parent: Node | None = None, *, full: bool = True) -> Node:
    parent_key = ROOT if parent is None else parent.key
    assert parent_key is not None
    return Node(
        parent=parent,
        parent_key=parent_key,
        page=page,
        tokens=tuple(tokens),
        origins=["m"] * len(tokens),
        key=block_key(parent_key, tokens) if full else None,
    )


def test_keys_are_chained() -> None:
    tokens = list(range(11))
    keys = block_keys(ROOT, tokens, PAGE)
    assert len(keys) == 2, "the last three tokens fill no page"
    assert keys[0] == block_key(ROOT, [0, 1, 2, 3])
    assert keys[1] == block_key(keys[0], [4, 5, 6, 7])
    # The same block after another beginning has another key.
    assert block_keys(ROOT, [9, *tokens[1:]], PAGE)[1] != keys[1]
    assert block_keys(ROOT, [], PAGE) == []


def test_roots_differ_by_weights_and_tenant() -> None:
    roots = [("a", ""), ("b", ""), ("a", "x"), ("ax", ""), ("", "ax"), ("", "")]
    assert len({root_key(*root) for root in roots}) == len(roots)


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([2], [3], 0)]
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == length


def test_a_hit_is_verified_by_its_tokens() -> None:
    index = PrefixIndex()
    first = node(1, [1, 2, 3, 4])
    index.insert(first)
    assert first.key is not None
    assert index.get(first.key, [1, 2, 3, 4]) is first
    assert index.get(first.key, [1, 2, 3, 5]) is None, "as if the hashes had collided"
    assert index.get(block_key(ROOT, [1, 2, 3, 5]), [1, 2, 3, 5]) is None
    first.state = PageState.FAILED
    assert index.get(first.key, [1, 2, 3, 4]) is None


def test_best_child_starts_with_most_of_the_tokens() -> None:
    index = PrefixIndex()
    short, long, full = (
        node(1, [1, 2], full=False),
        node(2, [1, 2, 3], full=False),
        node(3, [1, 9, 9, 9]),
    )
    for one in (short, long, full):
        index.insert(one)
    assert index.best_child(ROOT, [1, 2, 3, 4]) == (long, 3)
    assert index.best_child(ROOT, [1, 9]) == (full, 2)
    assert index.best_child(ROOT, [2, 2]) is None
    assert index.best_child(ROOT, []) is None
    assert index.best_child(block_key(ROOT, [7]), [1, 2]) is None
    long.state = PageState.ARRIVING
    found = index.best_child(ROOT, [1, 2, 3, 4])
    assert found is not None
    assert found[1] == 2


def test_a_page_that_fills_up_gets_its_key() -> None:
    index = PrefixIndex()
    partial = node(1, [1, 2], full=False)
    index.insert(partial)
    partial.tokens = (1, 2, 3, 4)
    key = block_key(ROOT, partial.tokens)
    index.complete(partial, key)
    assert index.get(key, [1, 2, 3, 4]) is partial
    with pytest.raises(AssertionError, match="indexed already"):
        index.insert(node(2, [1, 2, 3, 4]))
    with pytest.raises(AssertionError, match="page 1 is indexed"):
        index.insert(node(1, [5]))


def test_leaves_go_first_and_the_longest_unused_among_them() -> None:
    index = PrefixIndex()
    root = node(1, [1, 1, 1, 1])
    left, right = node(2, [2, 2, 2, 2], root), node(3, [3, 3], root, full=False)
    for one in (root, left, right):
        index.insert(one)
    with pytest.raises(AssertionError, match="leaves"):
        index.remove(root)
    for one in (root, right, left):
        index.offer(one)
    order = []
    while (victim := index.least_recent()) is not None:
        order.append(victim.page)
        index.remove(victim)
    assert order == [3, 2, 1]
    assert len(index) == index.num_unused == 0
    assert index.best_child(ROOT, [1]) is None


def test_a_page_in_use_is_no_victim() -> None:
    index = PrefixIndex()
    one, two = node(1, [1, 1, 1, 1]), node(2, [2, 2, 2, 2])
    for each in (one, two):
        index.insert(each)
        index.offer(each)
    index.withdraw(one)
    assert index.least_recent() is two
    index.offer(one)
    assert index.least_recent() is two, "the one used later goes later"
