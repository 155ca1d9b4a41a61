"""The sequences that run in a decode worker, and who gives way when there is no page left."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission
from pshare_jax.core.arrivals import Arrival, Arrivals
from pshare_jax.core.messages import DISPATCHER, Outbox
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Admit
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.shares import HasSequence, Holdings
from pshare_jax.core.stats import DecodeStats

_HOG = 4
"""Who has one slot of so many gives one to a client, a model or a request that has none."""

_LONG = 16
"""Tokens that a row must still have to go before it gives its slot away: others end soon anyway,
and a replay is not free."""


class DecodeRows:
    """Rows by the id of their sequence.

    Args:
        cache: the pages.
        admission: slots and pages.
        arrivals: sequences that have room, and not yet all their pages.
        outbox: messages to others.
        stats: what has been done.

    Attributes:
        elsewhere: what holds pages of this pool in a prefill core, and could give way there.
        crowded: whether anything holds pages in a prefill core of the same pool.
        starved: which of `elsewhere` is to give way now.
        short: arrival order of a sequence that waits for pages, after the last plan.
        removed: rows that have gone, so far.
    """

    def __init__(
        self,
        cache: PageCache,
        admission: Admission,
        arrivals: Arrivals,
        outbox: Outbox,
        stats: DecodeStats,
    ):
        self.elsewhere: Sequence_[HasSequence] = ()
        self.crowded = False
        self.starved: HasSequence | None = None
        self.short: int | None = None
        self.removed = 0
        self._cache = cache
        self._admission = admission
        self._arrivals = arrivals
        self._outbox = outbox
        self._stats = stats
        self._rows: dict[int, DecodeRow] = {}
        self._admits: list[Admit] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def all(self) -> list[DecodeRow]:
        """The rows, in the order in which they have come; another thread may ask."""
        return list(self._rows.values())

    def ids(self) -> set[int]:
        """Their sequences."""
        return set(self._rows)

    def get(self, id: int) -> DecodeRow | None:
        """The row of a sequence, if it runs."""
        return self._rows.get(id)

    def is_running(self, row: DecodeRow) -> bool:
        """Whether a row is still there."""
        return self._rows.get(row.sequence.id) is row

    def start(self, arrival: Arrival) -> None:
        """A sequence has all its pages: it runs from now on."""
        sequence, room = arrival.sequence, arrival.reservation
        self._outbox.append((sequence.prefill_worker, m.Release(sequence.held_id)))
        self._outbox.append((DISPATCHER, m.Started(sequence.id, arrival.usage)))
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

    def take_admits(self) -> list[Admit]:
        """What the executor has to be told of rows that have started since it was asked last."""
        admits, self._admits = self._admits, []
        return admits

    def remove(self, row: DecodeRow) -> None:
        """A row ends, or goes: its slot and pages are given back."""
        del self._rows[row.sequence.id]
        self.removed += 1
        self._admits = [admit for admit in self._admits if admit.id != row.sequence.id]
        self._cache.pin(row.pages, self._cache.now + row.sequence.ttl)
        self._admission.leave(row.slot, row.pages)

    def forget_wants(self) -> None:
        """What was noted of pages that are lacking was for the last plan."""
        self.starved, self.short = None, None

    def holdings(self) -> Holdings:
        """Slots of each client, model and request."""
        rows = [row.sequence for row in self._rows.values()]
        return Holdings((sequence, 1) for sequence in (*rows, *self._arrivals.sequences()))

    def make_room(self, newcomer: Sequence) -> bool:
        """Preempts a sequence for the sake of one that has nothing, if somebody has too much."""
        least = self._admission.num_slots / _HOG
        long = [row for row in self._rows.values() if row.remaining >= _LONG]
        hog = self.holdings().hog(newcomer, long, least)
        if hog is not None:
            self._preempt(hog)
        return hog is not None

    def starve_younger(self, order: int) -> None:
        """The youngest that holds pages elsewhere is to give way to who came at `order`.

        Until that one has room nobody younger gets pages there again.
        """
        self.short = order
        younger = [one for one in self.elsewhere if one.sequence.order > order]
        self._starve(max(younger, key=lambda one: one.sequence.order, default=None))

    def ensure_pages(self, row: DecodeRow, steps: int) -> bool:
        """Pages for the next `steps` tokens of `row`, preempting others if need be."""
        page_size = self._cache.page_size
        missing = -(-(row.num_kv + steps) // page_size) - len(row.pages)
        while missing > 0:
            fresh = self._cache.allocate(missing)
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

    def _starve(self, one: HasSequence | None) -> None:
        """Notes whose pages are needed."""
        if one is not None and self.starved is None:
            self.starved = one

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
        arriving = self._admission.num_inside > len(self._rows)
        is_alone = len(self._rows) == 1 and not self.crowded
        if not is_alone and not arriving:
            self._preempt(row)
        else:
            self.short = row.order
        return False

    def _preempt(self, row: DecodeRow) -> None:
        self._stats.preemptions[row.sequence.model] += 1
        self.remove(row)
        self._outbox.append((DISPATCHER, m.Returned(row.sequence.id, "preempted")))
