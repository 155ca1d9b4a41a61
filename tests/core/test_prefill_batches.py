"""Prompts whose chunks are computed in one call, and the pages that they write to."""

from __future__ import annotations

import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import PrefillPlan, PrefillResult
from pshare_jax.core.prefill import PrefillCore
from tests.core.sequences import make_sequence
from tests.core.setting import PAGE, model_specs

BEGINNING = [0, 1, 2, 3, 4, 5]
"""A page, and half of the next one."""


class Bench:
    """A prefill core without executor; prompts end with a token that is not covered."""

    def __init__(self, pages: int = 20):
        self.cache = PageCache(pages, PAGE)
        self.core = PrefillCore(
            "prefill0", self.cache, model_specs(["decode0"]), [4, 16], pads=False
        )

    def ask(self, id: int, covered: list[int], model: str = "lora") -> None:
        sequence = make_sequence(id, [*covered, 99], page_size=PAGE, model=model)
        self.core.receive(m.Prefill(sequence))

    def plan(self) -> PrefillPlan:
        """The next plan, which computes something."""
        plan = self.core.schedule()
        assert plan is not None
        assert plan.chunks
        return plan

    def compute(self) -> PrefillPlan:
        plan = self.plan()
        self.core.apply(plan, PrefillResult())
        return plan

    def done(self, *ids: int) -> None:
        """Prompts have been covered, and decode workers have their pages."""
        told = [message for _, message in self.core.outbox]
        self.core.outbox.clear()
        assert [c.sequence.id for c in told if isinstance(c, m.Covered)] == [*ids]
        for id in ids:
            self.core.receive(m.Release(id))


@pytest.fixture
def bench() -> Bench:
    """One whose index has `BEGINNING`."""
    bench = Bench()
    bench.ask(0, BEGINNING)
    bench.compute()
    bench.done(0)
    assert bench.cache.counts().cached == 2
    return bench


def pages_of(plan: PrefillPlan) -> dict[int, list[int]]:
    assert [(c.start, len(c.tokens)) for c in plan.chunks] == [(6, 2)] * len(plan.chunks)
    return {chunk.id: chunk.pages for chunk in plan.chunks}


def test_prompts_that_lack_nothing_are_covered_at_once(bench: Bench) -> None:
    """None of them waits for another one's page, which is there; nothing would wake it."""
    for id in (1, 2, 3):
        bench.ask(id, BEGINNING)
    assert bench.core.schedule() is None
    bench.done(1, 2, 3)


def test_of_two_that_go_on_from_half_a_page_one_has_a_copy(bench: Bench) -> None:
    """Both are computed in one call: they would write to the same places."""
    bench.ask(1, [*BEGINNING, 10, 11])
    bench.ask(2, [*BEGINNING, 20, 21])
    plan = bench.compute()
    pages = pages_of(plan)
    (whole, half), (same, copy) = pages[1], pages[2]
    assert whole == same
    assert half != copy
    assert plan.copies == [(half, copy)]
    bench.done(1, 2)
    bench.cache.check(idle=True)
    assert bench.cache.counts().cached == 3


def test_half_a_page_can_be_filled_after_one_who_began_it_has_gone(bench: Bench) -> None:
    bench.ask(1, [*BEGINNING, 10, 11])
    plan = bench.plan()
    _, half = pages_of(plan)[1]
    bench.core.receive(m.Abort(1))
    bench.core.apply(plan, PrefillResult())
    bench.ask(2, [*BEGINNING, 20, 21])
    plan = bench.compute()
    assert pages_of(plan)[2][1] == half
    assert plan.copies == []
    bench.done(2)
    bench.cache.check(idle=True)
    assert bench.cache.counts().cached == 2


def test_a_call_has_prompts_of_the_same_weights_only() -> None:
    """Though there would be room for all three."""
    bench = Bench()
    for id, model in enumerate(("lora", "isolated", "identity")):
        bench.ask(id, [10 * id, 10 * id + 1], model)
    plans = [bench.compute(), bench.compute()]
    assert [(plan.weights, [c.id for c in plan.chunks]) for plan in plans] == [
        ("base", [0, 2]),
        ("own", [1]),
    ]
    assert [plan.shape for plan in plans] == [(4, 4), (1, 4)]
    bench.done(0, 2, 1)


def test_pages_that_only_the_index_held_count_as_taken() -> None:
    """Those that are left for sequences that run in the same pool would else be taken, too."""
    bench = Bench(pages=9)
    bench.ask(0, list(range(24)))
    while bench.core.queue.tasks or bench.core.chunks.active:
        bench.compute()
    bench.done(0)
    assert (bench.cache.counts().cached, bench.cache.num_available) == (6, 8)
    bench.core.queue.reserve = 2
    bench.ask(1, list(range(27)))
    assert bench.core.schedule() is None, "it takes seven of eight"
    assert bench.cache.counts().used == 0
    bench.core.queue.reserve = 1
    plan = bench.compute()
    assert [(c.start, len(c.tokens)) for c in plan.chunks] == [(24, 3)]
    bench.done(1)
    bench.cache.check(idle=True)
