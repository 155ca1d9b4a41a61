"""What a router knows of many workers: exact as far as it was told, whoever misses what."""

from __future__ import annotations

from collections import Counter, OrderedDict

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pshare_jax.core.fleet import Fleet
from pshare_jax.core.index_feed import IndexFeed
from pshare_jax.core.key_map import KeyMap, members
from pshare_jax.core.messages import IndexChanged, IndexSnapshot
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import block_keys, root_key
from pshare_jax.core.router import MEET_TOKENS, NoWorkerError, Router
from pshare_jax.core.worker_view import WorkerInfo, WorkerView
from tests.core.sequences import make_sequence
from tests.core.test_page_cache import fill

PAGE = 2
KEYS = [bytes([i]) for i in range(6)]
held_by_each = st.lists(st.sets(st.sampled_from(KEYS)), min_size=1, max_size=70)


@given(held_by_each, st.lists(st.sampled_from(KEYS), max_size=6), st.data())
def test_runs_are_those_of_each_holder_alone(held, chain, data) -> None:
    known = KeyMap()
    for holder, keys in enumerate(held):
        for key in keys:
            known.add(key, holder)
            known.add(key, holder)
    asked = data.draw(st.sets(st.sampled_from(range(len(held)))))
    found = known.runs(chain, sum(1 << holder for holder in asked))
    lengths = {holder: length for length, mask in found for holder in members(mask)}
    assert [length for length, _ in found] == sorted({*lengths.values()}, reverse=True)
    for holder in asked:
        run = 0
        while run < len(chain) and chain[run] in held[holder]:
            run += 1
        assert lengths.pop(holder, 0) == run
    assert lengths == {}
    for holder, keys in enumerate(held):
        for key in keys:
            known.discard(key, holder)
            known.discard(key, holder)
    assert len(known) == 0


@given(st.sets(st.integers(0, 1100)))
def test_members_of_a_set_are_its_numbers(numbers) -> None:
    assert list(members(sum(1 << n for n in numbers))) == sorted(numbers)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 5), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 3),
)
def test_the_cheapest_is_that_of_all_costs(workers, more) -> None:
    """`workers` are tokens waiting, leading keys held, and keys held besides."""
    fleet = Fleet(lambda view: view.pending_tokens, spreads=True)
    chain = [b"chain%d" % i for i in range(5)]
    for number, (waiting, run, others) in enumerate(workers):
        view = fleet.add(WorkerInfo(f"prefill{number}", 100, PAGE))
        view.set_pending(1, waiting)
        other = [b"other%d" % i for i in range(others)]
        # A key after a gap is of no use.
        view.changed(IndexChanged([*chain[:run], *other, *chain[run + 1 :][:more]], [], 1))
        fleet.touch(view)

    def price(run: int) -> int:
        return 500 * (5 - run)

    everybody = fleet.among(fleet.views)
    best = fleet.cheapest(chain, everybody, price)
    costs: list[tuple[int, int, int, int]] = []
    for view in fleet.views.values():
        added = price(fleet.run(view, chain))
        costs.append((view.pending_tokens + added, added, view.num_known, view.slot))
    assert (best.total, best.added, best.num_known, best.slot) == min(costs)
    assert best.run == fleet.run(fleet.at(best.slot), chain)
    # Where routers meet, somebody of the same price is chosen, a little busier at the most.
    met = fleet.cheapest(chain, everybody, price, meeting=1000)
    assert met.run == best.run
    assert best.total <= met.total <= best.total + 1000
    assert met.total == costs[met.slot][0]


def test_a_slot_is_used_again_and_nothing_of_the_former_worker_is_left() -> None:
    fleet = Fleet(lambda view: view.load, spreads=False)
    old = fleet.add(WorkerInfo("decode0", 9, PAGE))
    fleet.add(WorkerInfo("decode1", 9, PAGE))
    old.changed(IndexChanged([b"a"], [], 1))
    old.remember([b"b"])
    fleet.add(WorkerInfo("decode0", 9, PAGE))
    new = fleet.views["decode0"]
    assert (new.slot, new.num_known) == (0, 0)
    assert fleet.run(new, [b"a"]) == fleet.run(new, [b"b"]) == 0
    assert fleet.among(["decode1", "decode0", "decode7"]).slots == [0, 1]
    assert fleet.lose("decode7") is None


class Telling:
    """A page cache whose changes are told to a view, some of them in vain."""

    def __init__(self) -> None:
        self.cache = PageCache(6, PAGE)
        self.feed = IndexFeed(self.cache)
        self.view = WorkerView(WorkerInfo("prefill0", 5, PAGE), 0, KeyMap())

    def use(self, tokens: list[int]) -> IndexChanged | None:
        self.cache.release(fill(self.cache, tokens))
        return self.feed.change()

    @property
    def believed(self) -> set[bytes]:
        return set(self.view.held)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=8), st.booleans()), max_size=25))
def test_who_misses_a_change_asks_and_then_knows_all(steps) -> None:
    telling, wanted = Telling(), False
    for tokens, arrives in steps:
        change = telling.use(tokens)
        if change is not None and arrives:
            wanted |= telling.view.changed(change)
            if telling.view.in_step:
                assert telling.believed == set(telling.cache.keys())
    assert wanted is not telling.view.in_step
    telling.view.snapshot(telling.feed.snapshot())
    assert telling.believed == set(telling.cache.keys())
    change = telling.use([7, 7, 7, 7])
    assert change is not None
    assert telling.view.changed(change) is False
    assert telling.view.in_step
    assert telling.believed == set(telling.cache.keys())
    telling.view.clear()
    assert len(telling.view.known) == 0


def test_it_asks_once_for_what_it_has_missed() -> None:
    view = Telling().view
    assert view.changed(IndexChanged([b"a"], [], 1)) is False
    assert view.changed(IndexChanged([b"c"], [], 3)) is True
    assert view.changed(IndexChanged([b"d"], [], 4)) is False
    assert view.held == {b"a", b"c", b"d"}
    view.snapshot(IndexSnapshot([b"d", b"e"], 4))
    assert view.held == {b"d", b"e"}
    # A snapshot that is older than what is known changes nothing.
    assert view.changed(IndexChanged([b"f"], [], 5)) is False
    view.snapshot(IndexSnapshot([], 4))
    assert view.held == {b"d", b"e", b"f"}


def test_a_worker_that_has_started_anew_is_noticed() -> None:
    view = Telling().view
    assert view.changed(IndexChanged([b"a"], [], 1, incarnation=5)) is False
    assert view.changed(IndexChanged([b"b"], [], 2, incarnation=6)) is True
    view.snapshot(IndexSnapshot([b"b"], 2, incarnation=6))
    assert view.held == {b"b"}
    assert view.changed(IndexChanged([b"c"], [], 3, incarnation=6)) is False


def test_a_key_that_left_and_came_back_is_told_of_as_it_is() -> None:
    cache = PageCache(3, PAGE)
    feed, (key,) = IndexFeed(cache), block_keys(root_key("base", ""), [1, 1], PAGE)
    cache.release(fill(cache, [1, 1]))
    feed.change()
    # Evicted by others, and computed again, before anybody was told.
    for tokens in ([2, 2, 3, 3], [1, 1]):
        cache.release(fill(cache, tokens))
    change = feed.change()
    assert change is not None
    assert key in change.added
    assert key not in change.removed
    assert change.number == 2
    # Come and gone in between: nobody need know.
    for tokens in ([4, 4], [5, 5, 6, 6]):
        cache.release(fill(cache, tokens))
    change = feed.change()
    assert change is not None
    assert not set(change.added) & set(change.removed)
    assert set(change.added) == set(block_keys(root_key("base", ""), [5, 5, 6, 6], PAGE))


def test_what_was_sent_is_known_until_it_is_held_and_then_as_long_as_it_is() -> None:
    view = WorkerView(WorkerInfo("prefill0", 3, PAGE), 0, KeyMap())
    view.remember([b"a", b"b"])
    assert view.sent == OrderedDict.fromkeys([b"a", b"b"])
    view.changed(IndexChanged([b"a"], [], 1))
    assert list(view.sent) == [b"b"]
    view.remember([b"a", b"b"])
    view.changed(IndexChanged([], [b"a"], 2))
    assert view.known.runs([b"a"], 1) == []
    view.remember([b"c", b"d", b"e"])
    assert list(view.sent) == [b"c", b"d", b"e"], "it cannot hold more than its pool"
    assert view.known.runs([b"b"], 1) == []
    assert view.num_known == 3


@pytest.fixture
def routers() -> list[Router]:
    """Two routers over four prefill and two decode workers, which hear of them in other orders."""
    made = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        prefill = [WorkerInfo(f"prefill{i}", 100, PAGE) for i in order]
        decode = [WorkerInfo(f"decode{i}", 100, PAGE) for i in range(2)]
        made.append(Router(prefill, decode, replicas=2))
    return made


def test_routers_meet_without_knowing_of_each_other(routers) -> None:
    places = set()
    for number in range(12):
        prompt = [number] * 9
        sent = [
            router.route(make_sequence(number, prompt, page_size=PAGE), ["decode0", "decode1"])
            for router in routers
        ]
        assert sent[0].prefill_worker == sent[1].prefill_worker
        places.add(sent[0].prefill_worker)
    assert len(places) > 1


@pytest.mark.parametrize("count", [2, 5, 64])
def test_new_contexts_are_spread_over_all_workers(count: int) -> None:
    fleet = Fleet(lambda view: view.pending_tokens, spreads=True)
    for number in range(count):
        fleet.add(WorkerInfo(f"prefill{number}", 100, PAGE))
    everybody = fleet.among(fleet.views)
    sent = Counter(
        fleet.cheapest(block_keys(b"", [n, n], PAGE), everybody, lambda run: 9, 1000).slot
        for n in range(100 * count)
    )
    assert len(sent) == count
    assert max(sent.values()) < 200
    # Who goes and comes again has the places that it had.
    before = list(fleet._ring)
    fleet.add(fleet.views["prefill1"].info)
    assert fleet._ring == before


def test_what_others_have_sent_counts_once_a_worker_says_so(routers) -> None:
    prompt = [1] * 41
    mine, theirs = routers
    home = mine.route(make_sequence(0, prompt, page_size=PAGE), ["decode0"]).prefill_worker
    theirs.note_others(home, 40)
    met = theirs.route(make_sequence(1, prompt, page_size=PAGE), ["decode0"])
    assert met.prefill_worker == home
    theirs.note_others(home, 2 * MEET_TOKENS)
    places = {
        theirs.route(make_sequence(n, [n] * 41, page_size=PAGE), ["decode0"]).prefill_worker
        for n in range(2, 20)
    }
    assert home not in places
    assert len(places) > 1
    # It is of this moment: the next figure takes its place.
    theirs.note_others(home, 0)
    assert theirs._prefill[home].others == 0
    # Pages that others' sequences read.
    theirs.note_others("decode0", 4000)
    chosen = theirs.route(make_sequence(20, [20] * 9, page_size=PAGE), ["decode0", "decode1"])
    assert chosen.decode_worker == "decode1"
    theirs.note_others("nobody", 3)


def test_what_nobody_knows_is_not_asked_for(routers) -> None:
    router = routers[0]
    assert router.index_changed("prefill0", IndexChanged([b"a"], [], 9)) is True
    router.index_snapshot("prefill0", IndexSnapshot([b"a"], 9))
    assert router.index_changed("prefill0", IndexChanged([b"b"], [], 10)) is False
    assert router.index_changed("nobody", IndexChanged([b"a"], [], 1)) is False


def test_a_decode_worker_with_a_partner_gets_no_pages_from_elsewhere() -> None:
    router = Router(
        [WorkerInfo("prefill0", 9, PAGE), WorkerInfo("prefill1", 9, PAGE, "decode1")],
        [WorkerInfo("decode0", 9, PAGE), WorkerInfo("decode1", 9, PAGE, "prefill1")],
    )
    both = ["decode0", "decode1"]
    sent = [router.route(make_sequence(n, [n] * 9, page_size=PAGE), both) for n in range(8)]
    pairs = {(sequence.prefill_worker, sequence.decode_worker) for sequence in sent}
    assert pairs == {("prefill0", "decode0"), ("prefill1", "decode1")}
    router.lose("prefill1")
    with pytest.raises(NoWorkerError, match=r"^no prefill worker is alive$"):
        router.route(make_sequence(9, [9] * 9, page_size=PAGE), ["decode1"])
