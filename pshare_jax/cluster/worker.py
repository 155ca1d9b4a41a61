"""A worker: a core, its executor, and how far the host may run ahead of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.fairness import Share
from pshare_jax.core.messages import IndexSnapshot, Message, Outbox, StoreChanged, WeightsFreed
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import (
    DecodePlan,
    DecodeResult,
    Landed,
    Offer,
    PrefillPlan,
    PrefillResult,
)
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.scheduling import DECODE_WEIGHT, PREFILL_WEIGHT

STEPS_AHEAD = 1
"""Decode steps that are begun before the tokens of the one before them are read."""


class PrefillRuns(Protocol):
    """What carries out prefill plans."""

    def own(self) -> None:
        """Makes the calling thread the owner of the pool."""
        ...

    def run(self, plan: PrefillPlan) -> PrefillResult:
        """Carries out a plan to its end."""
        ...


class DecodeRuns(Protocol):
    """What carries out decode plans, see `runtime.executor.DecodeExecutor`."""

    def own(self) -> None:
        """Makes the calling thread the owner of the pool."""
        ...

    def forget(self, group: str) -> None:
        """Drops the weights of a group of models of which none is left."""
        ...

    @property
    def num_dispatched(self) -> int:
        """Steps that were begun and not finished."""
        ...

    def begin(self, plan: DecodePlan) -> list[Landed]:
        """Begins a plan, whose offers have been made."""
        ...

    def offer(self, offers: Sequence[Offer]) -> PrefillResult:
        """Puts pages on offer to prefill workers; what came of each, as in a prefill result."""
        ...

    def finish(self) -> tuple[DecodePlan, DecodeResult]:
        """Finishes the oldest step."""
        ...


class Worker(Protocol):
    """What a host runs. All methods belong to one thread.

    Attributes:
        name: what messages go by.
        covers: whether it covers prompts; otherwise it generates.
        share: its part of the processor that it shares with others.
        outbox: messages to others.
    """

    name: str
    covers: bool
    share: Share
    outbox: Outbox

    @property
    def cache(self) -> PageCache:
        """Its pages."""
        ...

    @property
    def urgent(self) -> bool:
        """Whether others wait for something that needs no computation."""
        ...

    @property
    def first_due(self) -> bool:
        """Whether one piece of work is all that somebody's first token waits for."""
        ...

    @property
    def computes(self) -> bool:
        """Whether the next plan is likely to be one that computes."""
        ...

    @property
    def patience(self) -> float | None:
        """Seconds after which to look again though nothing was heard; None is for ever."""
        ...

    def setup(self) -> None:
        """Called once in the thread, before everything else."""
        ...

    def receive(self, message: Message) -> None:
        """Takes a message in."""
        ...

    def plan(self, now: float) -> Callable[[], bool] | None:
        """The next piece of work, to be called at once, or None. It says whether it got on."""
        ...

    def plan_ahead(self) -> Callable[[], bool] | None:
        """A piece of work that nobody waits for, to be called at once, or None."""
        ...

    @property
    def at_rest(self) -> bool:
        """Whether nobody waits for anything here."""
        ...

    def held_ids(self) -> set[int]:
        """Sequences that are known here, in any state."""
        ...

    def loads(self) -> dict[int, int]:
        """What each sequence means here: tokens to be computed, or pages to be read."""
        ...

    def index_snapshot(self) -> IndexSnapshot:
        """What its prefix index holds."""
        ...

    def store_snapshot(self) -> StoreChanged | None:
        """What the KV store is known to have, if there is one."""
        ...

    @property
    def has_begun(self) -> bool:
        """Whether the device still computes something for it."""
        ...

    def drain(self) -> None:
        """Finishes what the device still computes."""
        ...

    def release_all(self) -> None:
        """Gives all pages back, of sequences that will never end."""
        ...


P = TypeVar("P", bound=PrefillRuns)
D = TypeVar("D", bound=DecodeRuns)


class PrefillWorker(Generic[P]):
    """Covers prompts. `schedule` is the core's, or that of a pool which it shares."""

    covers = True

    def __init__(
        self,
        core: PrefillCore,
        executor: P,
        schedule: Callable[[float], PrefillPlan | None] | None = None,
    ):
        self.name = core.name
        self.core = core
        self.executor = executor
        self.share = Share(PREFILL_WEIGHT)
        self.outbox = core.outbox
        self._schedule = schedule or core.schedule

    @property
    def cache(self) -> PageCache:
        """See Worker."""
        return self.core.cache

    @property
    def urgent(self) -> bool:
        """See Worker."""
        return self.core.urgent

    @property
    def first_due(self) -> bool:
        """See Worker. It generates nothing."""
        return False

    @property
    def computes(self) -> bool:
        """See Worker."""
        return self.core.computes

    @property
    def patience(self) -> float | None:
        """See Worker."""
        return self.core.patience

    def setup(self) -> None:
        """See Worker."""
        self.executor.own()

    def receive(self, message: Message) -> None:
        """See Worker."""
        self.core.receive(message)

    def plan(self, now: float) -> Callable[[], bool] | None:
        """See Worker."""
        plan = self._schedule(now)
        return None if plan is None else lambda: self._run(plan)

    def plan_ahead(self) -> Callable[[], bool] | None:
        """See Worker."""
        plan = self.core.schedule_ahead()
        return None if plan is None else lambda: self._run(plan)

    @property
    def at_rest(self) -> bool:
        """See Worker."""
        return not self.core.held_ids()

    def held_ids(self) -> set[int]:
        """See Worker."""
        return self.core.held_ids()

    def loads(self) -> dict[int, int]:
        """See Worker."""
        return self.core.loads()

    def index_snapshot(self) -> IndexSnapshot:
        """See Worker."""
        return self.core.index_feed.snapshot()

    def store_snapshot(self) -> StoreChanged | None:
        """See Worker."""
        store = self.core.store
        return None if store is None else StoreChanged(store.behind.known(), [])

    @property
    def has_begun(self) -> bool:
        """See Worker. A chunk is waited for at once."""
        return False

    def drain(self) -> None:
        """See Worker."""

    def release_all(self) -> None:
        """See Worker."""
        self.core.release_all()

    def _run(self, plan: PrefillPlan) -> bool:
        result = self.executor.run(plan)
        self.core.apply(plan, result)
        # An empty plan looks at what is being pulled, which may not have come yet.
        return bool(result.landed) or plan != PrefillPlan()


class DecodeWorker(Generic[D]):
    """Generates. `schedule` is the core's, or that of a pool which it shares.

    Attributes:
        arrived: whether it is known of a transfer, without a look at it, that it can be ended.
    """

    covers = False

    def __init__(
        self,
        core: DecodeCore,
        executor: D,
        schedule: Callable[[float], DecodePlan | None] | None = None,
        steps_ahead: int = STEPS_AHEAD,
    ):
        self.name = core.name
        self.core = core
        self.executor = executor
        self.share = Share(DECODE_WEIGHT)
        self.outbox = core.outbox
        self.arrived: Callable[[], bool] = lambda: False
        self._schedule = schedule or core.schedule
        self._steps_ahead = steps_ahead

    @property
    def cache(self) -> PageCache:
        """See Worker."""
        return self.core.cache

    @property
    def urgent(self) -> bool:
        """See Worker."""
        return self.core.urgent or self.arrived()

    @property
    def computes(self) -> bool:
        """See Worker."""
        return self.core.computes or self.has_begun

    @property
    def first_due(self) -> bool:
        """See Worker."""
        return self.core.first_due

    @property
    def patience(self) -> float | None:
        """See Worker."""
        return self.core.patience

    def setup(self) -> None:
        """See Worker."""
        self.executor.own()

    def receive(self, message: Message) -> None:
        """See Worker."""
        if isinstance(message, WeightsFreed):
            self.executor.forget(message.group)
        else:
            self.core.receive(message)

    def plan(self, now: float) -> Callable[[], bool] | None:
        """See Worker."""
        if self.arrived() and not self.core.urgent:
            plan = self.core.schedule_landing()
            return lambda: self._run(plan)
        plan = self._schedule(now)
        if plan is not None:
            return lambda: self._run(plan)
        return self._finish if self.executor.num_dispatched else None

    def plan_ahead(self) -> Callable[[], bool] | None:
        """See Worker. Tokens are generated for those who wait for them alone."""
        return None

    @property
    def at_rest(self) -> bool:
        """See Worker."""
        return not self.core.held_ids()

    def held_ids(self) -> set[int]:
        """See Worker."""
        return self.core.held_ids()

    def loads(self) -> dict[int, int]:
        """See Worker."""
        return self.core.loads()

    def index_snapshot(self) -> IndexSnapshot:
        """See Worker."""
        return self.core.index_feed.snapshot()

    def store_snapshot(self) -> StoreChanged | None:
        """See Worker. Prefill workers alone use it."""
        return None

    @property
    def has_begun(self) -> bool:
        """See Worker."""
        return self.executor.num_dispatched > 0

    def drain(self) -> None:
        """See Worker."""
        while self.executor.num_dispatched:
            self._finish()

    def release_all(self) -> None:
        """See Worker."""
        self.core.release_all()

    def _run(self, plan: DecodePlan) -> bool:
        if plan.offers:
            self.core.offered(plan, self.executor.offer(plan.offers))
        landed = self.executor.begin(plan)
        self.core.landed(landed)
        while self.executor.num_dispatched > self._steps_ahead:
            self._finish()
        polled = plan.step is None and plan.replay is None and not (plan.pulls or plan.admits)
        if polled and not landed and self.executor.num_dispatched:
            # A transfer under way must not keep the tokens that are there.
            return self._finish()
        return bool(landed or plan.cancelled or plan.offers) or not polled

    def _finish(self) -> bool:
        self.core.apply(*self.executor.finish())
        return True
