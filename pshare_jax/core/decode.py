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

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission
from pshare_jax.core.arrivals import Arrival, Arrivals
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.messages import (
    DISPATCHER,
    Message,
    Outbox,
    PromptUsage,
    Sequence,
    TokenLogprobs,
)
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Admit, DecodePlan, DecodeResult, Landed, Replay, Step, StepRow
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.scheduling import GroupTurns, next_batch, preemption_victim, steps_for
from pshare_jax.core.stats import DecodeStats

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
        youngest_elsewhere: arrival order of the youngest sequence that holds pages of this pool in
            a prefill core, if the pool is shared.
        starved: arrival order of a sequence that needs pages which younger ones elsewhere hold.
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
        self.youngest_elsewhere: int | None = None
        self.starved: int | None = None
        self.admission = Admission(cache, config.max_num_seqs)
        self._models = models
        self._config = config
        self._bytes_per_page = bytes_per_page
        self._owns_cache = owns_cache
        ids = transfer_ids or (secrets.randbits(63) for _ in itertools.count())
        self._arrivals = Arrivals(name, cache, self.outbox, ids)
        self._queue: list[m.Covered] = []
        self._rows: dict[int, DecodeRow] = {}
        self._admits: list[Admit] = []
        self._group_turns = GroupTurns(config.group_quantum)
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
        """Sequences that have a slot and all their pages, by model."""
        counts: dict[str, int] = {}
        for row in tuple(self._rows.values()):
            counts[row.sequence.model] = counts.get(row.sequence.model, 0) + 1
        return counts

    def held_ids(self) -> set[int]:
        """Sequences that are known here, in any state."""
        return {covered.sequence.id for covered in self._queue} | self.inside_ids()

    def inside_ids(self) -> set[int]:
        """Sequences that have a slot and pages here."""
        return set(self._rows) | self._arrivals.ids()

    def receive(self, message: Message) -> None:
        """Takes a message in."""
        match message:
            case m.Covered():
                self._queue.append(message)
                self._queue.sort(key=lambda covered: covered.sequence.order)
            case m.Withdrawn(id):
                self._queue = [c for c in self._queue if c.sequence.id != id]
            case m.Offered(transfer, descriptors):
                self._arrivals.offered(transfer, descriptors)
            case m.NotOffered(transfer, reason):
                self._fetch_failed(transfer, reason)
            case m.Abort(id):
                self._abort(id)
            case _:
                raise TypeError(f"{self.name}: {type(message).__name__} is not for decode workers")
        self._enter()

    def schedule(self, now: float = 0.0) -> DecodePlan | None:
        """The next piece of work, or None; `now` is in seconds, from any start."""
        self.cache.tick(now)
        for transfer in self._arrivals.expired(now):
            self._fetch_failed(transfer, "the transfer took too long")
        self.starved = None
        self._enter()
        arrivals = self._arrivals
        if arrivals.pulls:
            # Alone, so that those who wait for the pages do not wait for a step as well.
            return self._plan()
        self._start_rows()
        replay = self._catch_up()
        step = self._next_step()
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
        self.stats.attended(result.plain_pages, result.saved_pages)
        for i, planned in enumerate(plan.step.rows):
            row = self._rows.get(planned.id)
            if row is not None and row.slot == planned.slot:
                row.planned -= plan.step.count
                self._accept(row, result.tokens[i], result.logprobs[i] if result.logprobs else [])
        self._enter()
        self._publish()

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
        added, removed = self.cache.changes()
        if added or removed:
            self._send(DISPATCHER, m.IndexChanged(added, removed))

    def _enter(self) -> None:
        """Gives room to covered sequences, strictly oldest first, as long as there is any.

        So a stream of small ones cannot starve a large one.
        """
        while self._queue:
            covered = self._queue[0]
            sequence = covered.sequence
            reservation = self.admission.reserve(sequence)
            if reservation is None:
                if self.admission.num_inside == 0:
                    self._starve(sequence.order)
                return
            del self._queue[0]
            moved = len(reservation.fill)
            num_bytes = moved * self._bytes_per_page
            if num_bytes:
                self.stats.handed_over(sequence.model, moved, num_bytes)
            usage = PromptUsage(
                covered.usage.prompt_tokens,
                covered.usage.computed_tokens,
                covered.usage.cached_tokens,
                covered.usage.shared_tokens,
                num_bytes,
            )
            self._arrivals.add(sequence, usage, reservation)

    def _starve(self, order: int) -> bool:
        """Notes that pages which somebody younger holds elsewhere are needed, if that is so."""
        if self.youngest_elsewhere is None or self.youngest_elsewhere <= order:
            return False
        self.starved = order if self.starved is None else min(self.starved, order)
        return True

    def _start_rows(self) -> None:
        for arrival in self._arrivals.complete():
            sequence, room = arrival.sequence, arrival.reservation
            self._send(sequence.prefill_worker, m.Release(sequence.id))
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
                )
            )
            self._rows[sequence.id] = DecodeRow(
                sequence, room.slot, room.pages, sequence.covered, list(sequence.output)
            )

    def _fetch_failed(self, transfer: int, reason: str) -> None:
        if not self._arrivals.knows(transfer):
            return
        self.stats.failed_transfers += 1
        given_up = self._arrivals.failed(transfer)
        if given_up is not None:
            self._give_back(given_up, reason)

    def _give_back(self, arrival: Arrival, reason: str) -> None:
        self._release(arrival)
        self._send(DISPATCHER, m.Returned(arrival.sequence.id, "fetch", reason))

    def _release(self, arrival: Arrival) -> None:
        self.admission.leave(arrival.reservation.slot, arrival.reservation.pages)
        self._send(arrival.sequence.prefill_worker, m.Release(arrival.sequence.id))

    def _abort(self, id: int) -> None:
        row = self._rows.get(id)
        if row is not None:
            self._remove(row)
        elif arrival := self._arrivals.remove(id):
            self._release(arrival)
        elif queued := [c for c in self._queue if c.sequence.id == id]:
            self._queue.remove(queued[0])
            self._send(queued[0].sequence.prefill_worker, m.Release(id))
        self._send(DISPATCHER, m.Dropped(id))

    def _remove(self, row: DecodeRow) -> None:
        del self._rows[row.sequence.id]
        self._admits = [admit for admit in self._admits if admit.id != row.sequence.id]
        self.cache.pin(row.pages, self.cache.now + row.sequence.ttl)
        self.admission.leave(row.slot, row.pages)

    def _catch_up(self) -> Replay | None:
        """One chunk of the KV that some row lacks before it can sample."""
        behind = [row for row in self._rows.values() if row.num_behind > 1]
        if not behind:
            return None
        row = min(behind, key=lambda row: (row.last_step, row.order))
        buckets = self._config.replay_buckets
        known = len(row.sequence.prompt) + len(row.output)
        start, end = row.num_kv, min(row.num_kv + max(buckets), known - 1)
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
        for group in self._group_turns.order(ready):
            rows = next_batch(ready[group], max(self._config.batch_buckets))
            step = self._step(group, rows)
            if step is not None:
                self._group_turns.stepped(group, ready)
                return step
        return None

    def _step(self, group: str, rows: list[DecodeRow]) -> Step | None:
        """None when no row could get the page it needs."""
        count = steps_for([row.remaining for row in rows], self._config.steps_per_dispatch)
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
        accepted, reason = row.accept(tokens)
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
            victim = preemption_victim(list(self._rows.values()), row)
            if self._starve(row.order if victim is None else victim.order):
                return False
            if victim is None:
                return self._yield_to_older(row)
            self._preempt(victim)
        return True

    def _yield_to_older(self, row: DecodeRow) -> bool:
        """`row` is the youngest and there is no page: it gives way unless it is the only one.

        With sequences still arriving it waits for them instead: they are younger. Prompts that hold
        pages elsewhere in the pool wait for room here, so it gives way to them too.
        """
        arriving = self.admission.num_inside > len(self._rows)
        is_alone = len(self._rows) == 1 and self.youngest_elsewhere is None
        if not is_alone and not arriving:
            self._preempt(row)
        return False

    def _preempt(self, row: DecodeRow) -> None:
        self.stats.preemptions[row.sequence.model] += 1
        self._remove(row)
        self._send(DISPATCHER, m.Returned(row.sequence.id, "preempted"))


def _adapter(spec: ModelSpec, sequence: Sequence) -> int:
    return spec.adapter if sequence.adapted else -1
