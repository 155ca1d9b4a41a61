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
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequence_

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission, Reservation
from pshare_jax.core.arrivals import Arrival, Arrivals
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.decode_queue import DecodeQueue
from pshare_jax.core.index_feed import IndexFeed
from pshare_jax.core.messages import DISPATCHER, Message, Outbox
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Admit, DecodePlan, DecodeResult, Landed, Replay, Step, StepRow
from pshare_jax.core.requests import PromptUsage, TokenLogprobs
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.scheduling import GroupTurns, next_batch, steps_for
from pshare_jax.core.sequences import Moved, Sequence
from pshare_jax.core.shares import HasSequence, Holdings
from pshare_jax.core.stats import DecodeStats

POLL_SECONDS = 0.0005
"""Between two looks at a transfer that is being pulled."""

_HOG = 4
"""Who has one slot of so many gives one to a client, a model or a request that has none."""

_LONG = 16
"""Tokens that a row must still have to go before it gives its slot away: others end soon anyway,
and a replay is not free."""

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
        elsewhere: what holds pages of this pool in a prefill core, and could give way there.
        crowded: whether anything holds pages in a prefill core of the same pool.
        starved: which of `elsewhere` is to give way now.
        short: arrival order of a row that waits for pages, after the last plan.
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
        self.elsewhere: Sequence_[HasSequence] = ()
        self.crowded = False
        self.starved: HasSequence | None = None
        self.short: int | None = None
        self.leaves = False
        self.admission = Admission(cache, config.max_num_seqs)
        self._models = dict(models)
        self._config = config
        self._bytes_per_page = bytes_per_page
        self.index_feed = IndexFeed(cache)
        self._owns_cache = owns_cache
        ids = transfer_ids or (secrets.randbits(63) for _ in itertools.count())
        self._arrivals = Arrivals(name, cache, self.outbox, ids)
        self._queue = DecodeQueue(self.admission, cache.page_size)
        self._changes = 0
        self._stuck = -1, 0
        self._rows: dict[int, DecodeRow] = {}
        self._admits: list[Admit] = []
        self._group_turns = GroupTurns(config.group_quantum)
        self._steps_under_way = 0
        self._tick = 0
        self._number = 0

    @property
    def urgent(self) -> bool:
        """Whether transfers can go on, for which no computation is needed."""
        return bool(self._arrivals.pulls)

    @property
    def patience(self) -> float | None:
        """Seconds after which `schedule` should be called again though nothing was heard."""
        if self._arrivals.is_pulling:
            return POLL_SECONDS
        return DEADLINE_SECONDS if self._arrivals.waits else None

    def running(self) -> dict[str, int]:
        """Sequences that have a slot and all their pages, by model; probes are not counted."""
        counts: dict[str, int] = {}
        for row in tuple(self._rows.values()):
            if not row.sequence.probe:
                counts[row.sequence.model] = counts.get(row.sequence.model, 0) + 1
        return counts

    def readers(self) -> list[tuple[str, list[int]]]:
        """The model and the pages of each sequence that `running` counts."""
        return [(row.sequence.model, row.pages) for row in tuple(self._rows.values())]

    def held_ids(self) -> set[int]:
        """Sequences that are known here, in any state."""
        return self._queue.ids() | self.inside_ids()

    def loads(self) -> dict[int, int]:
        """Pages of all sequences that are known here, by sequence."""
        rows = [row.sequence for row in self._rows.values()]
        known = [*rows, *self._arrivals.sequences(), *self._queue.sequences()]
        return {one.id: -(-one.num_tokens // self.cache.page_size) for one in known}

    def inside_ids(self) -> set[int]:
        """Sequences that have a slot and pages here."""
        return set(self._rows) | self._arrivals.ids()

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
            case m.IndexWanted():
                if self._owns_cache:
                    self._send(DISPATCHER, self.index_feed.snapshot())
            case m.ModelAdded(spec):
                self._models[spec.name] = spec
            case m.ModelRemoved(model):
                self._models.pop(model, None)
            case _:
                raise TypeError(f"{self.name}: {type(message).__name__} is not for decode workers")
        self._changes += 1
        self._enter()

    def schedule(self, now: float = 0.0) -> DecodePlan | None:
        """The next piece of work, or None; `now` is in seconds, from any start."""
        self.cache.tick(now)
        for transfer in self._arrivals.expired(now):
            self._fetch_failed(transfer, "the transfer took too long")
        self.starved, self.short = None, None
        self._enter()
        arrivals = self._arrivals
        if arrivals.pulls:
            # Alone, so that those who wait for the pages do not wait for a step as well.
            return self._plan()
        self._start_rows()
        if self.leaves:
            self._let_rows_go()
        replay = None if self.leaves else self._catch_up()
        step = None if self.leaves else self._next_step()
        if not (replay or step or self._admits or arrivals.cancelled or arrivals.is_pulling):
            self._publish()
            return None
        plan = self._plan(self._admits, replay, step)
        self._admits = []
        return plan

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
            self._number, arrivals.cancelled, arrivals.pulls, admits or [], replay, step
        )
        arrivals.cancelled, arrivals.pulls = [], []
        self._publish()
        return plan

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
        self._steps_under_way -= 1
        self.stats.attended(result.plain_pages, result.saved_pages)
        for i, planned in enumerate(plan.step.rows):
            row = self._rows.get(planned.id)
            if row is not None and row.slot == planned.slot:
                row.planned -= plan.step.count
                if i in result.failed:
                    self._remove(row)
                    self._send(DISPATCHER, m.Failed(planned.id, result.failed[i]))
                    continue
                forced = max(len(result.tokens[i]) - plan.step.count, 0)
                self.stats.forced_tokens[row.sequence.model] += forced
                self._accept(row, result.tokens[i], result.logprobs[i] if result.logprobs else [])
        self._enter()
        self._publish()

    def movable(self) -> list[DecodeRow]:
        """Rows that are to go, and of which nothing is under way."""
        return [row for row in self._rows.values() if row.planned == 0] if self.leaves else []

    def move(self, row: DecodeRow, moved: Moved) -> list[int]:
        """Lets a row go with its KV; the pages of that, whose references go to the caller."""
        count = len(moved.keys)
        pages, row.pages = row.pages[:count], row.pages[count:]
        self.stats.moved_rows += 1
        self._remove(row)
        self._send(DISPATCHER, m.Returned(row.sequence.id, "moved", moved=moved))
        return pages

    def release_all(self) -> None:
        """Gives all pages back, of sequences that nobody will end."""
        for row in tuple(self._rows.values()):
            self._remove(row)
        for id in self._arrivals.ids():
            arrival = self._arrivals.remove(id)
            if arrival is not None:
                self.admission.leave(arrival.reservation.slot, arrival.reservation.pages)
        self._queue.clear()
        self.outbox.clear()

    def _send(self, to: str, message: Message) -> None:
        self.outbox.append((to, message))

    def _publish(self) -> None:
        if not self._owns_cache:
            return
        change = self.index_feed.change()
        if change is not None:
            self._send(DISPATCHER, change)

    def make_room(self, newcomer: Sequence) -> bool:
        """Preempts a sequence for the sake of one that has nothing, if somebody has too much."""
        least = self.admission.num_slots / _HOG
        long = [row for row in self._rows.values() if row.remaining >= _LONG]
        hog = self._holdings().hog(newcomer, long, least)
        if hog is not None:
            self._preempt(hog)
        return hog is not None

    def _enter(self) -> None:
        """Gives room to covered sequences, as long as there is any."""
        if not self._queue or self._is_stuck:
            return
        for covered, room in self._queue.enter(self._holdings, self.make_room):
            self._arrive(covered, room)
        if self._queue and self.admission.num_inside == 0:
            order = self._queue.oldest.sequence.order
            younger = [one for one in self.elsewhere if one.sequence.order > order]
            self._starve(max(younger, key=lambda one: one.sequence.order, default=None))
        self._stuck = self._changes, self.cache.num_available

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
        self._arrivals.add(sequence, usage, room)

    def _holdings(self) -> Holdings:
        """Slots of each client, model and request."""
        rows = [row.sequence for row in self._rows.values()]
        return Holdings((sequence, 1) for sequence in (*rows, *self._arrivals.sequences()))

    def _starve(self, one: HasSequence | None) -> None:
        """Notes whose pages are needed."""
        if one is not None and self.starved is None:
            self.starved = one

    def _start_rows(self) -> None:
        for arrival in self._arrivals.complete():
            sequence, room = arrival.sequence, arrival.reservation
            self._send(sequence.prefill_worker, m.Release(sequence.held_id))
            self._send(DISPATCHER, m.Started(sequence.id, arrival.usage))
            tokens = (*sequence.prompt, *sequence.output)
            self._admits.append(
                Admit(
                    sequence.id,
                    room.slot,
                    tokens,
                    len(sequence.prompt),
                    sequence.params,
                    sequence.seed,
                    sequence.end_token_ids,
                )
            )
            self._rows[sequence.id] = DecodeRow(
                sequence, room.slot, room.pages, sequence.num_held, list(sequence.output)
            )

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
            self._remove(row)
            self._send(DISPATCHER, m.Returned(row.sequence.id, "moved"))

    def _give_back(self, arrival: Arrival, reason: str) -> None:
        self._release(arrival)
        self._send(DISPATCHER, m.Returned(arrival.sequence.id, "fetch", reason))

    def _release(self, arrival: Arrival) -> None:
        self._changes += 1
        self.admission.leave(arrival.reservation.slot, arrival.reservation.pages)
        self._send(arrival.sequence.prefill_worker, m.Release(arrival.sequence.held_id))

    def _abort(self, id: int) -> None:
        row = self._rows.get(id)
        if row is not None:
            self._remove(row)
        elif arrival := self._arrivals.remove(id):
            self._release(arrival)
        elif queued := self._queue.remove(id):
            self._send(queued.sequence.prefill_worker, m.Release(queued.sequence.held_id))
        self._send(DISPATCHER, m.Dropped(id))

    def _remove(self, row: DecodeRow) -> None:
        del self._rows[row.sequence.id]
        self._changes += 1
        self._admits = [admit for admit in self._admits if admit.id != row.sequence.id]
        self.cache.pin(row.pages, self.cache.now + row.sequence.ttl)
        self.admission.leave(row.slot, row.pages)

    def _catch_up(self) -> Replay | None:
        """One chunk of the KV that some row lacks before it can sample."""
        behind = [row for row in self._rows.values() if row.num_replayed > 0]
        for row in sorted(behind, key=lambda row: (row.last_step, row.order)):
            count = min(row.num_replayed, max(self._config.replay_buckets))
            if self._is_running(row) and self._ensure_pages(row, count):
                return self._replay(row, count)
        return None

    def _replay(self, row: DecodeRow, count: int) -> Replay:
        buckets = self._config.replay_buckets
        start, end = row.num_kv, row.num_kv + count
        row.num_kv = end
        self._tick += 1
        row.last_step = self._tick
        spec = self._models[row.sequence.model]
        return Replay(
            row.sequence.id,
            spec.group,
            _adapter(spec, row.sequence),
            row.pages,
            start,
            row.known_tokens(start, end),
            bucket_for(end - start, buckets),
        )

    def _next_step(self) -> Step | None:
        """A step for the first group, in turn, that can get the pages for one."""
        ready: dict[str, list[DecodeRow]] = {}
        for row in self._rows.values():
            if row.num_behind == 1 and row.remaining > 0:
                group = self._models[row.sequence.model].group
                ready.setdefault(group, []).append(row)
        if self._steps_under_way and self._group_turns.is_over(ready):
            return None
        for group in self._group_turns.order(ready):
            rows = next_batch(ready[group], max(self._config.batch_buckets))
            step = self._step(group, rows)
            if step is not None:
                self._group_turns.stepped(group, ready)
                self._steps_under_way += 1
                return step
        return None

    def _step(self, group: str, rows: list[DecodeRow]) -> Step | None:
        """None when no row could get the page it needs."""
        masked = any(row.sequence.params.masked for row in rows)
        limit = 1 if masked else self._config.steps_per_dispatch
        count = steps_for([row.remaining for row in rows], limit)
        batch = [row for row in rows if self._is_running(row) and self._ensure_pages(row, count)]
        # A row may have been preempted for the sake of one that came after it in the batch.
        batch = [row for row in batch if self._is_running(row)]
        if not batch:
            return None
        self._tick += 1
        planned: list[StepRow] = []
        for row in batch:
            adapter = _adapter(self._models[row.sequence.model], row.sequence)
            planned.append(StepRow(row.sequence.id, row.slot, adapter, row.pages, row.num_kv))
            row.last_step = self._tick
            row.planned += count
            row.num_kv += count
        return Step(group, bucket_for(len(batch), self._config.batch_buckets), count, planned)

    def _is_running(self, row: DecodeRow) -> bool:
        return self._rows.get(row.sequence.id) is row

    def _accept(self, row: DecodeRow, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        if not tokens:
            return
        accepted, reason = row.accept(tokens)
        if not row.sequence.probe:
            self.stats.generation_tokens[row.sequence.model] += len(accepted)
        if reason is not None:
            self._remove(row)
        entries = tuple(logprobs[: len(accepted)])
        self._send(DISPATCHER, m.Tokens(row.sequence.id, tuple(accepted), entries, reason))

    def _ensure_pages(self, row: DecodeRow, steps: int) -> bool:
        """Pages for the next `steps` tokens of `row`, preempting younger sequences if need be."""
        page_size = self.cache.page_size
        missing = -(-(row.num_kv + steps) // page_size) - len(row.pages)
        while missing > 0:
            fresh = self.cache.allocate(missing)
            if fresh is not None:
                row.pages = [*row.pages, *fresh]
                return True
            victim = self._victim(row)
            if victim is None:
                return self._yield(row)
            if not isinstance(victim, DecodeRow):
                self._starve(victim)
                self.short = row.order
                return False
            self._preempt(victim)
        return True

    def _victim(self, row: DecodeRow) -> HasSequence | None:
        """Whose pages a row may take: those of another one, or of what is elsewhere."""
        inside = [(one.sequence, 1.0) for one in self._rows.values()]
        inside += [(sequence, 1.0) for sequence in self._arrivals.sequences()]
        holdings = Holdings([*inside, *((one.sequence, 1.0) for one in self.elsewhere)])
        return holdings.victim(row.sequence, [*self._rows.values(), *self.elsewhere])

    def _yield(self, row: DecodeRow) -> bool:
        """Nobody has to give way to `row`, and there is no page: so it does, unless it is alone.

        With sequences still arriving it waits for them instead: they will be rows. Prompts that
        hold pages elsewhere in the pool wait for room here, so it gives way to them too.
        """
        arriving = self.admission.num_inside > len(self._rows)
        is_alone = len(self._rows) == 1 and not self.crowded
        if not is_alone and not arriving:
            self._preempt(row)
        else:
            self.short = row.order
        return False

    def _preempt(self, row: DecodeRow) -> None:
        self.stats.preemptions[row.sequence.model] += 1
        self._remove(row)
        self._send(DISPATCHER, m.Returned(row.sequence.id, "preempted"))


def _adapter(spec: ModelSpec, sequence: Sequence) -> int:
    return spec.adapter if sequence.adapted else -1
