"""Executors that compute nothing: they carry out a core's plans in the time that those would take.

A session's text is its number, again and again, in its prompts and in what is generated. So two
sessions share no prefix, and a session's context begins with what it was before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pshare_jax.bench.plan.clock import Processor
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.store import SimStoreEnd
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import (
    Chunk,
    DecodePlan,
    DecodeResult,
    Landed,
    Offer,
    PrefillPlan,
    PrefillResult,
    Step,
)


class _Costed:
    """What both executors count.

    Args:
        processor: what computes.
        costs: of the mesh.
        cache: the pool's pages.

    Attributes:
        seconds: of work.
        peak_pages: most pages of the pool that were in use or cached.
    """

    def __init__(self, processor: Processor, costs: CostModel, cache: PageCache):
        self.seconds = 0.0
        self.peak_pages = 0
        self._processor = processor
        self._costs = costs
        self._cache = cache

    def own(self) -> None:
        """There is no pool."""

    def _compute(self, seconds: float) -> float:
        """Begins work; when it will be done."""
        counts = self._cache.counts()
        self.peak_pages = max(self.peak_pages, counts.used + counts.cached)
        self.seconds += seconds
        return self._processor.compute(seconds)


class CostPrefill(_Costed):
    """Carries out prefill plans, see `cluster.worker.PrefillRuns`. Copies cost nothing.

    Attributes:
        computed_tokens: prompt tokens that were computed.
        store: the end of the KV store, if there is one.
    """

    def __init__(self, processor: Processor, costs: CostModel, cache: PageCache):
        super().__init__(processor, costs, cache)
        self.computed_tokens = 0
        self.store: SimStoreEnd | None = None

    def run(self, plan: PrefillPlan) -> PrefillResult:
        """Waits for as long as offers, copies from and for the store, and chunks take."""
        seconds = sum(self._costs.send(len(offer.pages)) for offer in plan.offers)
        if plan.store is not None and self.store is not None:
            seconds += self.store.run(plan.store, self._processor.now)
        if plan.chunks:
            seconds += chunk_seconds(self._costs, plan.shape, plan.chunks)
            self.computed_tokens += sum(len(chunk.tokens) for chunk in plan.chunks)
        self._processor.wait(self._compute(seconds))
        return PrefillResult(offered={offer.transfer: [] for offer in plan.offers})


def chunk_seconds(costs: CostModel, shape: tuple[int, int], chunks: Sequence[Chunk]) -> float:
    """Seconds of a call: those of one chunk of all its tokens, of which each sees as many as the
    call's tokens see in the mean."""
    rows, bucket = shape
    counts = [len(chunk.tokens) for chunk in chunks]
    tokens = sum(counts)
    seen = sum(n * (chunk.start + (n + 1) / 2) for n, chunk in zip(counts, chunks, strict=True))
    return costs.chunk(rows * bucket, tokens, seen / tokens - (tokens + 1) / 2)


class CostDecode(_Costed):
    """Carries out decode plans, see `cluster.worker.DecodeRuns`. Transfers land at once; the first
    step of their sequences comes after them.

    Attributes:
        steps: decode steps made.
    """

    def __init__(self, processor: Processor, costs: CostModel, cache: PageCache):
        super().__init__(processor, costs, cache)
        self.steps = 0
        self._texts: dict[int, int] = {}
        self._dispatched: deque[tuple[float, DecodePlan, DecodeResult]] = deque()

    def forget(self, group: str) -> None:
        """There are no weights here."""

    @property
    def num_dispatched(self) -> int:
        """Steps that were begun and not finished."""
        return len(self._dispatched)

    def offer(self, offers: Sequence[Offer]) -> PrefillResult:
        """Nobody borrows pages here: routers of one process name no lender."""
        raise NotImplementedError("no offers of decode workers in virtual time")

    def begin(self, plan: DecodePlan) -> list[Landed]:
        """Begins a plan, for whose end `finish` waits."""
        seconds = sum(self._costs.receive(len(pull.targets)) for pull in plan.pulls)
        for admit in plan.admits:
            self._texts[admit.slot] = admit.tokens[0]
        if replay := plan.replay:
            seconds += self._costs.replay(replay.bucket, len(replay.tokens), replay.start)
        if step := plan.step:
            seconds += self._step_seconds(step)
        end = self._compute(seconds)
        if step:
            self.steps += 1
            tokens = [[self._texts[row.slot]] * step.count for row in step.rows]
            self._dispatched.append((end, plan, DecodeResult(plan.number, tokens)))
        return [Landed(pull.transfer) for pull in plan.pulls]

    def finish(self) -> tuple[DecodePlan, DecodeResult]:
        """Waits for the oldest step that was begun."""
        end, plan, result = self._dispatched.popleft()
        self._processor.wait(end)
        return plan, result

    def _step_seconds(self, step: Step) -> float:
        rows = len(step.rows)
        context = sum(row.start for row in step.rows) + rows
        return step.count * self._costs.decode_step(step.bucket, rows, context)
