"""The decode core: all models of one pool, which sequences have room, and whose turn it is.

Sequences of all models share the prompt pages of one pool; what a decode module writes goes to
pages that only its sequence has. LoRA modules of one base decode in one batch, full modules in a
batch each. A sequence that arrives with more than one token to read (a tail longer than 1, or a
replay after preemption) first extends its KV by those tokens with its own weights.

Plans may be made before the results of earlier ones are known: a row that goes on is planned at
its next position, and tokens of a row that turns out to have ended are dropped.
"""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission, Reservation
from pshare_jax.core.arrivals import Arrival, Arrivals
from pshare_jax.core.decode_queue import DecodeQueue
from pshare_jax.core.decode_rows import DecodeRows
from pshare_jax.core.index_feed import IndexFeed
from pshare_jax.core.loans import Loans
from pshare_jax.core.messages import DISPATCHER, Message, Outbox
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import (
    Admit,
    DecodePlan,
    DecodeResult,
    Landed,
    PrefillResult,
    Replay,
    Step,
)
from pshare_jax.core.requests import PromptUsage, TokenLogprobs
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.sequences import Moved
from pshare_jax.core.stats import DecodeStats
from pshare_jax.core.step_planner import StepPlanner

POLL_SECONDS = 0.0005
"""Between two looks at a transfer that is being pulled."""

DEADLINE_SECONDS = 0.5
"""Between two looks at the deadlines of transfers."""


class DecodeCore:
    """Generates for sequences whose prompts were covered by prefill workers.

    Args:
        name: of the worker.
        cache: the pages; shared with a prefill core where both use one pool.
        models: the served models by name.
        config: batch buckets and limits.
        bytes_per_page: what moving a page from another pool moves; 0 where both use one pool.
        owns_cache: whether it reports what enters and leaves the index.
        transfer_ids: see `Arrivals`.

    Attributes:
        outbox: messages to others; who carries them empties it.
        stats: what has been done.
        index_feed: what routers are told of its index.
        rows: the sequences that run.
        loans: pages that prefill workers get.
        leaves: whether all sequences are to go, since the mesh does something else.
    """

    def __init__(
        self,
        name: str,
        cache: PageCache,
        models: Mapping[str, ModelSpec],
        config: DecodeConfig,
        bytes_per_page: int,
        *,
        owns_cache: bool = True,
        transfer_ids: Iterator[int] | None = None,
    ):
        self.name = name
        self.cache = cache
        self.outbox: Outbox = []
        self.stats = DecodeStats()
        self.leaves = False
        self.admission = Admission(cache, config.max_num_seqs)
        self._models = dict(models)
        self._bytes_per_page = bytes_per_page
        self.index_feed = IndexFeed(cache)
        self._owns_cache = owns_cache
        ids = transfer_ids or (secrets.randbits(63) for _ in itertools.count())
        self.loans = Loans(name, cache, self.outbox)
        self._arrivals = Arrivals(name, cache, self.outbox, ids)
        self._queue = DecodeQueue(self.admission, cache.page_size)
        self.rows = DecodeRows(cache, self.admission, self._arrivals, self.outbox, self.stats)
        self._steps = StepPlanner(self.rows, self._models, config)
        self._heard = 0
        self._stuck = -1, 0
        self._number = 0

    @property
    def urgent(self) -> bool:
        """Whether transfers can go on, for which no computation is needed."""
        return bool(self._arrivals.pulls) or self.loans.wanted

    @property
    def first_due(self) -> bool:
        """Whether a step is all that some sequence lacks for its first token."""
        rows = self.rows.all()
        due = any(not row.started and row.num_behind == 1 for row in rows)
        return due or self._arrivals.any_complete

    @property
    def computes(self) -> bool:
        """Whether the next plan is likely to have a step or a replay."""
        return bool(self.rows) or self._arrivals.any_complete

    @property
    def patience(self) -> float | None:
        """Seconds after which `schedule` should be called again though nothing was heard."""
        if self._arrivals.is_pulling:
            return POLL_SECONDS
        return DEADLINE_SECONDS if self._arrivals.waits or self.loans else None

    def running(self) -> dict[str, int]:
        """Sequences that have a slot and all their pages, by model; probes are not counted."""
        rows = [row.sequence for row in self.rows.all()]
        return Counter(sequence.model for sequence in rows if not sequence.probe)

    def readers(self) -> list[tuple[str, list[int]]]:
        """The model and the pages of each sequence that `running` counts."""
        return [(row.sequence.model, row.pages) for row in self.rows.all()]

    def held_ids(self) -> set[int]:
        """Sequences that are known here, in any state, those that borrow pages among them."""
        return self._queue.ids() | self.inside_ids() | self.loans.ids()

    def loads(self) -> dict[int, int]:
        """Pages of all sequences that are known here, by sequence."""
        rows = [row.sequence for row in self.rows.all()]
        known = [*rows, *self._arrivals.sequences(), *self._queue.sequences()]
        return {one.id: -(-one.num_tokens // self.cache.page_size) for one in known}

    @property
    def short(self) -> int | None:
        """Arrival order of who waits for pages, after the last plan, if that is still here."""
        order = self.rows.short
        rows = [row.sequence for row in self.rows.all()]
        known = (*rows, *self._arrivals.sequences(), *self._queue.sequences())
        return order if any(one.order == order for one in known) else None

    def inside_ids(self) -> set[int]:
        """Sequences that have a slot and pages here."""
        return self.rows.ids() | self._arrivals.ids()

    def receive(self, message: Message) -> None:
        """Takes a message in."""
        match message:
            case m.Covered():
                self._queue.add(message)
                if self.leaves:
                    self._let_waiting_go()
            case m.SetRole(works):
                self.leaves = not works
                if self.leaves:
                    self._let_waiting_go()
            case m.Withdrawn(id):
                self._queue.remove(id)
            case m.Offered(transfer, descriptors, address):
                self._arrivals.offered(transfer, descriptors, address)
            case m.NotOffered(transfer, reason):
                self._fetch_failed(transfer, reason)
            case m.Abort(id):
                self._abort(id)
            case m.Lend():
                self.loans.lend(message)
            case m.Repaid(id, transfer):
                self.loans.repaid(id, transfer)
            case m.IndexWanted():
                if self._owns_cache:
                    self._send(DISPATCHER, self.index_feed.snapshot())
            case m.ModelAdded(spec):
                self._models[spec.name] = spec
            case m.ModelRemoved(model):
                self._models.pop(model, None)
            case _:
                raise TypeError(f"{self.name}: {type(message).__name__} is not for decode workers")
        self._heard += 1
        self._enter()
        if isinstance(message, m.Covered) and message.offer is not None:
            # Who has no room now asks for its pages when there is some: no offer stands for ever.
            self._queue.forget_offer(message.sequence.id)
            self._arrivals.let_go(message.offer.transfer)

    def schedule(self, now: float = 0.0) -> DecodePlan | None:
        """The next piece of work, or None; `now` is in seconds, from any start."""
        self.cache.tick(now)
        for transfer in self._arrivals.expired(now):
            self._fetch_failed(transfer, "the transfer took too long")
        self.loans.expire(now)
        arrivals = self._arrivals
        arrivals.cancelled += self.loans.take_ended()
        self.rows.forget_wants()
        self._enter()
        if arrivals.pulls or self.loans.wanted:
            # Alone, so that those who wait for the pages do not wait for a step as well.
            return self._plan()
        for arrival in arrivals.refetch():
            self._release(arrival)
            self._send(DISPATCHER, m.Returned(arrival.sequence.id, "preempted"))
        for arrival in arrivals.complete():
            self.rows.start(arrival)
        if self.leaves:
            self._let_rows_go()
        replay = None if self.leaves else self._steps.catch_up()
        step = None if self.leaves else self._steps.next_step()
        admits = self.rows.take_admits()
        if not (replay or step or admits or arrivals.cancelled or arrivals.is_pulling):
            self._publish()
            return None
        return self._plan(admits, replay, step)

    def schedule_landing(self) -> DecodePlan:
        """A plan that ends the transfers that can be ended, and does nothing else."""
        return self._plan()

    def _plan(
        self,
        admits: list[Admit] | None = None,
        replay: Replay | None = None,
        step: Step | None = None,
    ) -> DecodePlan:
        """A plan of these and of the transfers that are to begin and to end."""
        arrivals = self._arrivals
        self._number += 1
        plan = DecodePlan(
            self._number,
            cancelled=arrivals.cancelled,
            pulls=arrivals.pulls,
            offers=self.loans.take_offers(),
            admits=admits or [],
            replay=replay,
            step=step,
        )
        arrivals.cancelled, arrivals.pulls = [], []
        self._publish()
        return plan

    def offered(self, plan: DecodePlan, result: PrefillResult) -> None:
        """The offers of a plan have been made, or could not be."""
        self.loans.offered(plan.offers, result)

    def landed(self, transfers: list[Landed]) -> None:
        """Transfers have ended; known as soon as a plan has been begun."""
        for transfer in transfers:
            if transfer.error is None:
                self._arrivals.landed(transfer.transfer)
            else:
                self._fetch_failed(transfer.transfer, transfer.error)

    def apply(self, plan: DecodePlan, result: DecodeResult) -> None:
        """Takes in what came of a plan; results come in the order of plans."""
        if plan.step is None:
            return
        self._steps.ended()
        self.stats.attended(result.plain_pages, result.saved_pages)
        for i, planned in enumerate(plan.step.rows):
            row = self.rows.get(planned.id)
            if row is not None and row.slot == planned.slot:
                row.planned -= plan.step.count
                if i in result.failed:
                    self.rows.remove(row)
                    self._send(DISPATCHER, m.Failed(planned.id, result.failed[i]))
                    continue
                forced = max(len(result.tokens[i]) - plan.step.count, 0)
                self.stats.forced_tokens[row.sequence.model] += forced
                self._accept(row, result.tokens[i], result.logprobs[i] if result.logprobs else [])
        self._enter()
        self._publish()

    def movable(self) -> list[DecodeRow]:
        """Rows that are to go, and of which nothing is under way."""
        return [row for row in self.rows.all() if row.planned == 0] if self.leaves else []

    def move(self, row: DecodeRow, moved: Moved) -> list[int]:
        """Lets a row go with its KV; the pages of that, whose references go to the caller."""
        count = len(moved.keys)
        pages, row.pages = row.pages[:count], row.pages[count:]
        self.stats.moved_rows += 1
        self.rows.remove(row)
        self._send(DISPATCHER, m.Returned(row.sequence.id, "moved", moved=moved))
        return pages

    def release_all(self) -> None:
        """Gives all pages back, of sequences that nobody will end."""
        for row in self.rows.all():
            self.rows.remove(row)
        for id in self._arrivals.ids():
            arrival = self._arrivals.remove(id)
            if arrival is not None:
                self.admission.leave(arrival.reservation.slot, arrival.reservation.pages)
        self._queue.clear()
        self.loans.release_all()
        self.outbox.clear()

    def _send(self, to: str, message: Message) -> None:
        self.outbox.append((to, message))

    def _publish(self) -> None:
        if not self._owns_cache:
            return
        change = self.index_feed.change()
        if change is not None:
            self._send(DISPATCHER, change)

    def _enter(self) -> None:
        """Gives room to covered sequences, as long as there is any."""
        if not self._queue or self._is_stuck:
            return
        for covered, room in self._queue.enter(self.rows.holdings, self.rows.make_room):
            self._arrive(covered, room)
        if self._queue and self.admission.num_inside == 0:
            order = self._queue.oldest.sequence.order
            self.rows.starve_younger(order)
        self._stuck = self._changes, self.cache.num_available

    @property
    def _changes(self) -> int:
        """Grows with all that may give somebody room."""
        return self._heard + self.rows.removed

    @property
    def _is_stuck(self) -> bool:
        """Whether nothing has come free since nobody could enter."""
        changes, available = self._stuck
        unchanged = changes == self._changes and self.cache.num_available <= available
        return unchanged and self.admission.num_inside > 0

    def _arrive(self, covered: m.Covered, room: Reservation) -> None:
        sequence, moved = covered.sequence, len(room.fill)
        num_bytes = moved * self._bytes_per_page
        if num_bytes:
            self.stats.handed_over(sequence.model, moved, num_bytes)
        if sequence.moved is not None:
            self.stats.moved_pages += moved
        usage = PromptUsage(
            covered.usage.prompt_tokens,
            covered.usage.computed_tokens,
            covered.usage.cached_tokens,
            covered.usage.shared_tokens,
            num_bytes,
        )
        used = self._arrivals.add(sequence, usage, room, covered.offer, covered.first)
        self.stats.used_offers += used

    def _fetch_failed(self, transfer: int, reason: str) -> None:
        if not self._arrivals.knows(transfer):
            return
        self.stats.failed_transfers += 1
        given_up = self._arrivals.failed(transfer)
        if given_up is not None:
            self._give_back(given_up, reason)

    def _let_waiting_go(self) -> None:
        """Gives back what does not run yet; where it goes its pages are fetched again."""
        for id in self._queue.ids():
            if (covered := self._queue.remove(id)) is not None:
                sequence = covered.sequence
                self._send(sequence.prefill_worker, m.Release(sequence.held_id))
                self._send(DISPATCHER, m.Returned(id, "moved"))
        for id in self._arrivals.ids():
            if (arrival := self._arrivals.remove(id)) is not None:
                self._release(arrival)
                self._send(DISPATCHER, m.Returned(id, "moved"))

    def _let_rows_go(self) -> None:
        """Gives back rows that nobody has taken with their KV: they will be replayed."""
        for row in self.movable():
            self.rows.remove(row)
            self._send(DISPATCHER, m.Returned(row.sequence.id, "moved"))

    def _give_back(self, arrival: Arrival, reason: str) -> None:
        self._release(arrival)
        self._send(DISPATCHER, m.Returned(arrival.sequence.id, "fetch", reason))

    def _release(self, arrival: Arrival) -> None:
        self._heard += 1
        self.admission.leave(arrival.reservation.slot, arrival.reservation.pages)
        self._send(arrival.sequence.prefill_worker, m.Release(arrival.sequence.held_id))

    def _abort(self, id: int) -> None:
        self.loans.repaid(id)
        row = self.rows.get(id)
        if row is not None:
            self.rows.remove(row)
        elif arrival := self._arrivals.remove(id):
            self._release(arrival)
        elif queued := self._queue.remove(id):
            self._send(queued.sequence.prefill_worker, m.Release(queued.sequence.held_id))
        self._send(DISPATCHER, m.Dropped(id))

    def _accept(self, row: DecodeRow, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        if not tokens:
            return
        accepted, reason = row.accept(tokens)
        if not row.sequence.probe:
            self.stats.generation_tokens[row.sequence.model] += len(accepted)
        if reason is not None:
            self.rows.remove(row)
        entries = tuple(logprobs[: len(accepted)])
        self._send(DISPATCHER, m.Tokens(row.sequence.id, tuple(accepted), entries, reason))
