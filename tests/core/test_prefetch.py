"""Pages that are fetched before anybody asks: when, how many, and never in anybody's way."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.plans import StorePlan
from pshare_jax.core.prefetch import MAX_PIECE, Prefetch
from pshare_jax.core.prices import DISK, SHARED, Prices
from pshare_jax.core.sequences import Sequence
from tests.core.store_bench import PAGE, PRICES, Bench

BYTES = 10
"""Of a page."""


class Early(Bench):
    """A core that fetches ahead, with room for so many pages that nobody has used."""

    def __init__(self, budget: int = 100, pages: int = 100, prices: Prices = PRICES):
        super().__init__(pages, prices)
        self.client.ahead = Prefetch(self.client, self.cache, budget * BYTES, BYTES)

    @property
    def ahead(self) -> Prefetch:
        assert self.client.ahead is not None
        return self.client.ahead

    def expect(self, tokens: int, seed: int = 0, ttl: float = 0.0) -> Sequence:
        """Says that a prompt is expected, which is nobody's yet."""
        sequence = msgspec.structs.replace(self.prompt(tokens, seed), ttl=ttl)
        self.core.receive(m.Expected(sequence))
        return sequence

    def plan(self) -> StorePlan:
        plan = self.store()
        assert plan is not None
        return plan

    def look(self, sequence: Sequence, places: list[int]) -> StorePlan:
        """Has an expected prompt looked for; the plan after the answer."""
        (look,) = self.plan().looks
        assert (look.id, look.ahead) == (sequence.id, True)
        self.core.receive(m.Looked(sequence.id, places))
        return self.plan()

    def load(self, plan: StorePlan) -> None:
        """Answers the loads of a plan, and carries out what follows."""
        for load in plan.loads:
            self.core.receive(m.Loaded(load.transfer))
        while (more := self.store()) is not None:
            for load in more.loads:
                self.core.receive(m.Loaded(load.transfer))

    def bytes(self) -> tuple[int, int, int]:
        self.ahead._sweep()
        stats = self.client.stats
        return stats.early_bytes, stats.early_used_bytes, stats.early_wasted_bytes


def test_what_is_expected_is_there_before_it_is_asked_for():
    bench = Early()
    expected = bench.expect(10)
    plan = bench.look(expected, [SHARED] * 3)
    assert all(load.ahead for load in plan.loads)
    bench.load(plan)
    assert bench.bytes() == (3 * BYTES, 0, 0)
    assert bench.ahead.num_unused == 3
    assert bench.client.stats.looks == 0, "nobody has asked"
    sequence = bench.ask(10)
    assert bench.store() is None, "there is nothing to look for"
    assert bench.covered() == [sequence.id]
    assert bench.bytes() == (3 * BYTES, 3 * BYTES, 0)
    assert (bench.ahead.num_unused, bench.client.stats.stall_seconds) == (0, 0.0)
    bench.core.receive(m.Release(sequence.id))
    bench.cache.check(idle=True)


def test_the_budget_holds_until_pages_are_used_or_gone():
    bench = Early(budget=5)
    expected = bench.expect(4 * PAGE)
    bench.load(bench.look(expected, [SHARED] * 4))
    another = bench.expect(4 * PAGE, seed=1)
    bench.load(bench.look(another, [SHARED] * 4))
    assert bench.ahead.num_unused == 5
    assert bench.cache.matched_tokens(another.keys, another.prompt) == PAGE
    bench.expect(PAGE, seed=2)
    assert bench.store() is None, "there is no room in the budget"
    taken = bench.cache.allocate(bench.cache.num_available)
    assert taken is not None
    assert bench.bytes() == (5 * BYTES, 0, 5 * BYTES)
    bench.cache.release(taken)
    assert bench.plan().looks[0].ahead


def test_who_asks_goes_first():
    """With anybody waiting for the store, nothing is begun that nobody waits for."""
    bench = Early()
    count = MAX_PIECE + 4
    prices = replaced_prices(page=0.0001)
    bench.client.prices = prices
    expected = bench.expect(count * PAGE)
    plan = bench.look(expected, [SHARED] * count)
    (piece,) = plan.loads
    assert len(piece.keys) == MAX_PIECE
    asked = bench.ask(3 * PAGE, seed=1)
    assert [look.ahead for look in bench.plan().looks] == [False], "it does not wait for the piece"
    bench.core.receive(m.Looked(asked.id, [SHARED] * 3))
    (load,) = bench.plan().loads
    assert load.ahead is False
    bench.core.receive(m.Loaded(piece.transfer))
    commit = bench.plan()
    assert ([c.transfer for c in commit.commits], commit.loads) == ([piece.transfer], [])
    assert bench.store() is None, "the rest waits for who has asked"
    bench.core.receive(m.Loaded(load.transfer))
    bench.store()
    assert bench.store() is None, "the prompt has its turn first"
    (rest,) = bench.plan().loads
    assert (rest.ahead, len(rest.keys)) == (True, 4)
    bench.load(StorePlan(loads=[rest]))
    assert bench.bytes()[0] == count * BYTES


def replaced_prices(page: float) -> Prices:
    return msgspec.structs.replace(PRICES, call={SHARED: 0.0001}, page={SHARED: page})


def test_a_prompt_that_comes_takes_over():
    """It waits for the piece on its way, and the rest is looked for as anybody's."""
    bench = Early()
    expected = bench.expect(8 * PAGE)
    (piece,) = bench.look(expected, [SHARED] * 8).loads
    assert len(piece.keys) == 4, "what takes no longer than 5 ms"
    sequence = bench.ask(8 * PAGE)
    assert bench.store() is None
    bench.core.receive(m.Loaded(piece.transfer))
    assert bench.plan().commits
    (look,) = bench.plan().looks
    assert (look.keys, look.ahead) == (sequence.keys[4:], False)
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 4))
    plan = bench.plan()
    assert [load.ahead for load in plan.loads] == [False]
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    assert bench.store() is None
    assert bench.covered() == [sequence.id]
    assert bench.bytes() == (4 * BYTES, 4 * BYTES, 0)


def test_slow_tiers_are_read_a_page_at_a_time():
    slow = Prices(1.0, 0.0, {DISK: 0.001}, {DISK: 0.015})
    bench = Early(prices=slow)
    expected = bench.expect(3 * PAGE)
    (piece,) = bench.look(expected, [DISK] * 3).loads
    assert len(piece.keys) == 1


def test_what_is_cheaper_to_compute_is_not_fetched():
    bench = Early(prices=Prices(0.001, 0.0, {SHARED: 0.001, DISK: 0.1}, {SHARED: 0.001, DISK: 0.1}))
    expected = bench.expect(4 * PAGE)
    (look,) = bench.plan().looks
    bench.core.receive(m.Looked(look.id, [DISK] * 4))
    assert bench.store() is None
    assert (expected.id, bench.client.stats.declined) == (look.id, 4)


@pytest.mark.parametrize("how", ["failed", "late"])
def test_what_does_not_come_is_not_asked_for_again(how: str):
    bench = Early()
    expected = bench.expect(2 * PAGE)
    (piece,) = bench.look(expected, [SHARED] * 2).loads
    if how == "failed":
        bench.core.receive(m.Loaded(piece.transfer, "its checksum is wrong"))
    else:
        bench.store()
        bench.now += 1.0
        assert bench.plan().dropped == [piece.transfer]
        bench.core.receive(m.Loaded(piece.transfer))
        assert bench.plan().dropped == [piece.transfer]
    assert bench.store() is None
    assert bench.bytes() == (0, 0, 0)
    assert bench.ahead.num_unused == 0
    bench.cache.check(idle=True)


def test_pages_that_are_written_go_first():
    bench = Early()
    sequence = bench.ask(2 * PAGE)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    bench.chunk()
    bench.core.receive(m.Release(sequence.id))
    expected = msgspec.structs.replace(sequence, id=1000, prompt=(9,) * 9, keys=[b"x", b"y"])
    bench.core.receive(m.Expected(expected))
    plan = bench.plan()
    assert (len(plan.saves), plan.looks) == (2, [])
    assert bench.plan().looks[0].ahead


def test_pinned_pages_and_a_part_of_the_pool_are_left_alone():
    bench = Early(pages=17)
    expected = bench.expect(16 * PAGE)
    bench.load(bench.look(expected, [SHARED] * 16))
    assert bench.ahead.num_unused == 14, "an eighth is left"


def test_ttl_keeps_what_was_fetched():
    bench = Early(pages=17)
    expected = bench.expect(2 * PAGE, ttl=5.0)
    bench.load(bench.look(expected, [SHARED] * 2))
    assert bench.cache.num_pinned == 2


def test_a_prompt_that_came_is_not_fetched_ahead():
    bench = Early()
    expected = bench.expect(2 * PAGE)
    sequence = bench.ask(3 * PAGE)
    (look,) = bench.plan().looks
    assert (look.id, look.ahead) == (sequence.id, False)
    bench.core.receive(m.Looked(sequence.id, []))
    bench.chunk()
    bench.chunk()
    assert bench.store() is None
    assert expected.keys == sequence.keys[:2]


def test_the_number_of_expected_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pshare_jax.core.prefetch.MAX_EXPECTED", 2)
    bench = Early()
    sequences = [bench.expect(PAGE, seed) for seed in range(3)]
    for sequence in (*sequences[1:],):
        (look,) = bench.plan().looks
        assert look.id == sequence.id
        bench.core.receive(m.Looked(look.id, []))
    assert bench.store() is None


def test_nothing_is_fetched_ahead_while_prompts_are_computed():
    """It would be written into the pool in turns that they wait for."""
    bench = Early()
    expected = bench.expect(3 * PAGE)
    asked = bench.ask(3 * PAGE, seed=1)
    assert [(look.id, look.ahead) for look in bench.plan().looks] == [(asked.id, False)]
    bench.core.receive(m.Looked(asked.id, []))
    plans = [bench.chunk() for _ in range(2)]
    assert all(plan.store is None for plan in plans)
    assert bench.covered() == [asked.id]
    assert [(look.id, look.ahead) for look in bench.plan().looks] == [(expected.id, True)]


def test_what_is_on_its_way_comes_though_prompts_are_computed():
    """But for the piece that is on its way the rest is for when they have been covered."""
    bench = Early()
    expected = bench.expect(8 * PAGE)
    (piece,) = bench.look(expected, [SHARED] * 8).loads
    asked = bench.ask(3 * PAGE, seed=1)
    assert [look.ahead for look in bench.plan().looks] == [False]
    bench.core.receive(m.Looked(asked.id, []))
    bench.core.receive(m.Loaded(piece.transfer))
    assert [commit.transfer for commit in bench.plan().commits] == [piece.transfer]
    assert all(bench.chunk().store is None for _ in range(2))
    (rest,) = bench.plan().loads
    assert rest.ahead
    assert len(piece.keys) + len(rest.keys) == 8
