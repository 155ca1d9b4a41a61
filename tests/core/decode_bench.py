"""A decode core without executor: a test is its prefill workers, and what carries out its plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.messages import DISPATCHER
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import DecodePlan, DecodeResult, Landed
from pshare_jax.core.requests import PromptUsage
from pshare_jax.core.sequences import Sequence
from tests.core.sequences import make_sequence
from tests.core.setting import model_specs

PAGE, USABLE, SLOTS, STEPS = 8, 27, 8, 4


def sequence(order: int, prompt: list[int]) -> Sequence:
    """One whose id is its order of arrival."""
    return make_sequence(order, prompt, page_size=PAGE)


class Bench:
    """A decode core of 27 pages and 8 slots; a test is its prefill workers and its executor.

    Attributes:
        said: everything that it has told the dispatcher, but for what is in its index.
    """

    def __init__(self) -> None:
        config = DecodeConfig(
            batch_buckets=[4], max_num_seqs=SLOTS, replay_buckets=[4], steps_per_dispatch=STEPS
        )
        self.cache = PageCache(USABLE + 1, PAGE)
        self.core = DecodeCore(
            "decode0",
            self.cache,
            model_specs(["decode0"]),
            config,
            64,
            transfer_ids=itertools.count(),
        )
        self.said: list[m.Message] = []
        self.fetches: dict[int, m.Fetch] = {}
        self.released: list[int] = []

    def cover(self, *sequences: Sequence) -> None:
        """Prompts have been covered; the core hears of it."""
        for covered in sequences:
            usage = PromptUsage(len(covered.prompt), covered.covered, 0, 0)
            self.receive(m.Covered(covered, usage))

    def receive(self, message: m.Message) -> None:
        self.core.receive(message)
        self._hear()

    def schedule(self) -> DecodePlan | None:
        plan = self.core.schedule()
        self._hear()
        return plan

    def apply(self, plan: DecodePlan | None) -> None:
        """The step of a plan has been computed; it has brought no end tokens."""
        assert plan is not None
        assert plan.step is not None
        tokens = [[1] * plan.step.count for _ in plan.step.rows]
        self.core.apply(plan, DecodeResult(plan.number, tokens))
        self._hear()

    def pull(self, id: int) -> int:
        """The pages that a sequence has asked for last are offered; returns the transfer."""
        fetch = self.fetches[id]
        self.receive(m.Offered(fetch.transfer, []))
        plan = self.schedule()
        assert plan is not None
        assert [pull.transfer for pull in plan.pulls] == [fetch.transfer]
        return fetch.transfer

    def land(self, id: int) -> None:
        """They arrive."""
        self.core.landed([Landed(self.pull(id))])

    def run(self, *sequences: Sequence) -> DecodePlan | None:
        """Sequences come in and all their pages arrive; returns the first plan that they are in."""
        for one in sequences:
            self.cover(one)
            self.core.landed([Landed(self.fetches[one.id].transfer)])
        return self.schedule()

    def started(self) -> list[int]:
        return [message.id for message in self.said if isinstance(message, m.Started)]

    def returned(self) -> list[m.Message]:
        return [message for message in self.said if isinstance(message, m.Returned)]

    def _hear(self) -> None:
        while self.core.outbox:
            to, message = self.core.outbox.pop(0)
            if isinstance(message, m.Fetch):
                assert (to, message.worker) == ("prefill0", "decode0")
                self.fetches[message.id] = message
            elif isinstance(message, m.Release):
                assert to == "prefill0"
                self.released.append(message.id)
            elif not isinstance(message, m.IndexChanged):
                assert to == DISPATCHER
                self.said.append(message)


@contextmanager
def decode_bench() -> Iterator[Bench]:
    """One whose books are right at the end."""
    bench = Bench()
    yield bench
    bench.cache.check()
    bench.core.release_all()


def step_rows(plan: DecodePlan | None) -> list[int]:
    """Who is in the step of a plan."""
    assert plan is not None
    return [] if plan.step is None else [row.id for row in plan.step.rows]
