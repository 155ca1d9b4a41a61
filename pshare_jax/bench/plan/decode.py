"""A decode engine in virtual time: the policy of `pshare_jax.engine.decode` and `admission`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pshare_jax.bench.plan.chains import ChainPool, Lease
from pshare_jax.bench.plan.clock import Clock, Processor, Thread, Work
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.requests import SimRequest
from pshare_jax.config import DecodeConfig
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.scheduling import (
    DECODE_WEIGHT,
    GroupTurns,
    next_batch,
    preemption_victim,
    steps_for,
)


@dataclass(frozen=True)
class Room:
    """Pages for one request, of which `moved` have to be sent."""

    lease: Lease
    moved: int


class _Row:
    """A running request; `behind` known tokens have no KV yet, the last of them is fed next."""

    __slots__ = ("behind", "last_step", "lease", "left", "num_kv", "order", "request", "running")

    def __init__(self, request: SimRequest, lease: Lease):
        self.request = request
        self.lease = lease
        self.order = request.order
        self.num_kv = request.cover
        self.behind = request.num_tokens - request.cover
        self.left = request.remaining
        self.last_step = -1
        self.running = True

    @property
    def started(self) -> bool:
        """Whether there is a token of it."""
        return len(self.request.arrivals) > 0


@dataclass(frozen=True)
class DecodeSettings:
    """Of `pshare_jax.config.DecodeConfig`, what the simulation needs."""

    max_num_seqs: int
    batch_buckets: Sequence[int]
    replay_buckets: Sequence[int]
    steps_per_dispatch: int = 1
    group_quantum: int = DecodeConfig.group_quantum


class SimDecode(Thread):
    """Generates tokens, one group of models a step.

    Args:
        clock: the time.
        processor: what computes its steps.
        costs: of its mesh.
        pool: its pages.
        settings: batch sizes and limits.
        on_preempt: takes a preempted request back to prefill.
        on_room: called when pages or slots have become free.

    Attributes:
        steps: decode steps made.
        generated_tokens: tokens generated.
        preemptions: requests that lost their pages.
    """

    def __init__(
        self,
        clock: Clock,
        processor: Processor,
        costs: CostModel,
        pool: ChainPool,
        settings: DecodeSettings,
        on_preempt: Callable[[SimRequest], None],
        on_room: Callable[[], None],
    ):
        super().__init__(clock, processor, DECODE_WEIGHT)
        self.pool = pool
        self.steps = 0
        self.generated_tokens = 0
        self.preemptions = 0
        self._costs = costs
        self._settings = settings
        self._on_preempt = on_preempt
        self._on_room = on_room
        self._inside = 0
        self._first_refused: SimRequest | None = None
        self._inbox: list[tuple[SimRequest, Room]] = []
        self._rows: list[_Row] = []
        self._tick = 0
        self._group_turns = GroupTurns(settings.group_quantum)

    def reserve(self, request: SimRequest) -> Room | None:
        """A slot and pages for all known tokens, or None when there is no room now.

        A page for each sequence inside is left over, and who was refused comes before all younger.
        """
        first = self._first_refused
        if first is not None and first.order < request.order:
            return None
        room = self._reserve(request) if self._inside < self._settings.max_num_seqs else None
        if room is None:
            self._first_refused = request
            return None
        if first is request:
            self._first_refused = None
            self._on_room()
        return room

    def _reserve(self, request: SimRequest) -> Room | None:
        pool, cover = self.pool, request.cover
        full = min(pool.tokens(request.chain), cover) // pool.page_size
        lease = pool.hold(request.chain, full)
        needed = pool.pages_for(request.num_tokens) - full
        if pool.num_available < needed + self._inside or not pool.allocate(lease, needed):
            pool.release(lease)
            return None
        pool.extend(lease, cover - cover % pool.page_size, request.model)
        self._inside += 1
        return Room(lease, pool.pages_for(cover) - full)

    def commit(self, request: SimRequest, room: Room) -> None:
        """Takes over a request and the pages that were sent for it."""
        self._inbox.append((request, room))
        self.notify()

    def work(self) -> Work:
        """Takes arrivals in, lets one row catch up, then gives one group of models a step."""
        settings = self._settings
        arrivals, self._inbox = self._inbox, []
        if seconds := sum(self._costs.receive(room.moved) for _, room in arrivals):
            yield seconds
        self._rows += [_Row(request, room.lease) for request, room in arrivals]
        behind = [row for row in self._rows if row.behind > 1]
        if behind:
            yield self._catch_up(min(behind, key=lambda row: (row.last_step, row.order)))
        ready: dict[str, list[_Row]] = {}
        for row in self._rows:
            if row.behind == 1:
                ready.setdefault(str(row.request.group), []).append(row)
        for group in self._group_turns.order(ready):
            rows = next_batch(ready[group], max(settings.batch_buckets))
            steps = steps_for([row.left for row in rows], settings.steps_per_dispatch)
            if batch := self._with_pages(rows, steps):
                yield from self._step(batch, steps)
                self._group_turns.stepped(group, ready)
                return True
        return bool(arrivals or behind)

    def _catch_up(self, row: _Row) -> float:
        buckets = self._settings.replay_buckets
        start, tokens = row.num_kv, min(row.behind - 1, max(buckets))
        row.num_kv += tokens
        row.behind -= tokens
        self._tick += 1
        row.last_step = self._tick
        return self._costs.replay(bucket_for(tokens, buckets), tokens, start)

    def _with_pages(self, rows: Sequence[_Row], steps: int) -> list[_Row]:
        """Those rows that have the pages of a step, or get them."""
        batch = [row for row in rows if row.running and self._ensure_pages(row, steps)]
        # A row may have been preempted for the sake of one that came after it.
        return [row for row in batch if row.running]

    def _step(self, batch: Sequence[_Row], steps: int) -> Work:
        self._tick += 1
        bucket = bucket_for(len(batch), self._settings.batch_buckets)
        context = sum(row.num_kv for row in batch) + len(batch)
        seconds = steps * self._costs.decode_step(bucket, len(batch), context)
        yield seconds
        self.steps += 1
        self.generated_tokens += steps * len(batch)
        times = [self._clock.now] * steps
        for row in batch:
            row.last_step = self._tick
            row.num_kv += steps
            row.left -= steps
            row.request.arrivals += times
            if not row.left:
                self._remove(row)
                row.request.on_finish()
        return True

    def _ensure_pages(self, row: _Row, steps: int) -> bool:
        lease, page_size = row.lease, self.pool.page_size
        missing = -(-(row.num_kv + steps) // page_size) - lease.pages - lease.private
        while missing > 0 and not self.pool.allocate(lease, missing):
            victim = preemption_victim(self._rows, row)
            if victim is None:
                # The youngest gives way, unless others, younger still, are on their way here.
                if len(self._rows) > 1 and self._inside == len(self._rows):
                    self._preempt(row)
                return False
            self._preempt(victim)
        return True

    def _preempt(self, row: _Row) -> None:
        self.preemptions += 1
        self._remove(row)
        self._on_preempt(row.request)

    def _remove(self, row: _Row) -> None:
        self._rows.remove(row)
        row.running = False
        self.pool.release(row.lease)
        self._inside -= 1
        self._on_room()
