"""Which prefill worker covers a prompt, and which decode worker generates.

A prefill worker costs the tokens that wait there, plus twice the tokens of this prompt that it
would have to compute: those delay this prompt as waiting does, and all others besides. So a
session stays with the worker that has its context, and prompts that come at once for several
models meet on one worker, until that is behind by more than the context is worth. A decode worker
costs the pages that its sequences read in each step, plus the pages that it would have to receive.
(The costs are in the manner of NVIDIA Dynamo's KV router.)

The router knows workers by what they have said: which keys entered and left their prefix indexes,
and how many prompt tokens wait. It may be wrong for a moment; then something is computed twice.
Several routers may send sequences to the same workers; they do not know of each other. What the
others have sent is part of the load that workers tell of now and then. A context that is new to
all of them goes to a place that its keys give, where it meets with what the others sent.

With the policy `load` what the KV store has counts as held by every worker. So a prompt that is
known goes where least waits, whoever has computed it; among equals to the one whose pool holds most
of it. One that the store does not have yet is routed by prefix. Sessions do not stay anywhere.

A session stays where it was unless that is overloaded, that is, costs more than elsewhere by more
than its further calls are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Sequence_

import msgspec

from pshare_jax.config import RoutingPolicy
from pshare_jax.core.fleet import Among, Cost, Fleet
from pshare_jax.core.lender import lender_of
from pshare_jax.core.messages import IndexChanged, IndexSnapshot
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.sessions import SessionKey, SessionTable
from pshare_jax.core.stored_keys import StoredKeys
from pshare_jax.core.worker_view import WorkerInfo, WorkerView

__all__ = ["NoWorkerError", "Router", "WorkerInfo"]

COMPUTE_WEIGHT = 2
"""What computing a token costs, in tokens of waiting."""

STAY_TOKENS = 1024
"""Tokens of waiting that a session bears to stay with its prefill worker."""

STAY_SHARE = 4
"""A session stays with a decode worker that has more to read, up to this part of its pool."""

MEET_TOKENS = 1024
"""Tokens of waiting that a sequence bears to meet with what other routers send."""


class NoWorkerError(Exception):
    """No worker that could do it is alive; says which were asked for."""


class Router:
    """Routes sequences; remembers where prompts were sent.

    Args:
        prefill: the prefill workers.
        decode: the decode workers.
        policy: how prefill workers are chosen.
        replicas: routers that send sequences to these workers, this one included.
        lends: whether workers give pages to prefill workers, see `core.borrowing`.
    """

    def __init__(
        self,
        prefill: Sequence_[WorkerInfo],
        decode: Sequence_[WorkerInfo],
        policy: RoutingPolicy = "prefix",
        *,
        replicas: int = 1,
        lends: bool = False,
    ):
        self._lends = lends
        self._policy = policy
        self._stored = StoredKeys()
        self._covering = Fleet(lambda view: view.pending_tokens + view.others, spreads=True)
        self._generating = Fleet(lambda view: view.load + view.others, spreads=False)
        self._prefill, self._decode = self._covering.views, self._generating.views
        self._meeting = MEET_TOKENS if replicas > 1 else 0
        self._assigned: dict[int, tuple[WorkerView | None, WorkerView, int]] = {}
        self._resting: set[str] = set()
        self._twins: dict[str, str] = {}
        self._able: dict[tuple[str, ...], tuple[Among, Among]] = {}
        self._sessions = SessionTable()
        for info in prefill:
            self.add(info, prefill=True)
        for info in decode:
            self.add(info, prefill=False)

    @property
    def workers(self) -> list[str]:
        """Names of the workers that are alive."""
        return [*self._prefill, *self._decode]

    def add(self, info: WorkerInfo, *, prefill: bool) -> None:
        """A worker has come, or come again with nothing in its pool."""
        (self._covering if prefill else self._generating).add(info)
        if info.twin:
            self._twins[info.name] = info.twin
        self.set_role(info.name, works=not info.rests)

    def lose(self, worker: str) -> None:
        """A worker is not alive any more, or takes no more sequences."""
        self._covering.lose(worker)
        self._generating.lose(worker)
        self._able.clear()

    @property
    def prefill_workers(self) -> list[str]:
        """Names of the prefill workers that are alive."""
        return list(self._prefill)

    def twin(self, worker: str) -> str:
        """The other worker of a mesh that may do either, or nothing."""
        return self._twins.get(worker, "")

    def working(self, names: Iterable[str]) -> list[str]:
        """Those of some workers that are alive and take sequences."""
        alive = {*self._prefill, *self._decode} - self._resting
        return [name for name in names if name in alive]

    def loads(self) -> tuple[dict[str, int], dict[str, int]]:
        """Prompt tokens that wait, by prefill worker that works, and covered sequences by decode
        worker that does."""
        waiting = {n: self._prefill[n].pending_tokens for n in self.working(self._prefill)}
        sequences = dict.fromkeys(self.working(self._decode), 0)
        pending = {id for view in self._prefill.values() for id in view.pending}
        for id, (_, decode, _) in self._assigned.items():
            if decode.info.name in sequences and id not in pending:
                sequences[decode.info.name] += 1
        return waiting, sequences

    def unserved(self, hosts: Mapping[str, Iterable[str]]) -> str:
        """What nobody does, `hosts` being decode workers by model; empty if there is no such."""
        if not self.working(self._prefill):
            return "cover prompts"
        lacking = (name for name, workers in hosts.items() if not self.working(workers))
        return next((f"generate for {name}" for name in lacking), "")

    def set_role(self, worker: str, *, works: bool) -> None:
        """A worker takes sequences from now on, or takes none."""
        (self._resting.discard if works else self._resting.add)(worker)
        self._able.clear()

    def route(
        self,
        sequence: Sequence,
        decode_workers: Iterable[str],
        session: SessionKey | None = None,
        next_hosts: Mapping[str, int] | None = None,
        avoided: Collection[str] = (),
    ) -> Sequence:
        """The sequence with its workers and `num_uncached`.

        Args:
            sequence: a new attempt.
            decode_workers: those that host its model.
            session: that it is a call of.
            next_hosts: how many of the models that will be asked next a decode worker hosts.
            avoided: prefill workers that are taken if there are no others.

        Raises:
            NoWorkerError: none of those that could do it is alive.
        """
        able, alone = self._who_can(tuple(decode_workers), sequence.model)
        if avoided:
            others = {self._covering.at(slot).info.name for slot in able.slots} - {*avoided}
            able = self._covering.among(others) if others else able
        stay = self._sessions.find(session)
        prefill, uncached = self._best_prefill(sequence, able, stay.prefill if stay else "")
        hosts = alone
        if prefill.info.partner:
            hosts = self._generating.among([prefill.info.partner])
        latest = (
            [name for name in reversed(stay.decode) if self._is_one(name, hosts)][:1]
            if stay
            else []
        )
        decode, num_pages = self._best_decode(sequence, hosts, latest, next_hosts or {})
        self._sessions.went(session, prefill.info.name, decode.info.name)
        lender = ""
        if self._lends:
            lacking = min(uncached, self._stored.lacking(sequence, prefill.info.page_size))
            lender = lender_of(sequence, lacking, prefill, decode, self._covering, self._generating)
        prefill.set_pending(sequence.id, uncached)
        prefill.remember(sequence.chain)
        decode.load += num_pages
        self._touch(prefill, decode)
        self._assigned[sequence.id] = prefill, decode, num_pages
        return msgspec.structs.replace(
            sequence,
            prefill_worker=prefill.info.name,
            decode_worker=decode.info.name,
            num_there=self._generating.run(decode, sequence.keys),
            lender=lender,
            num_uncached=uncached,
        )

    def move(
        self,
        sequence: Sequence,
        decode_workers: Iterable[str],
        session: SessionKey | None = None,
    ) -> Sequence:
        """A sequence that takes its KV along, with the worker that goes on with it.

        Args:
            sequence: a new attempt; its `prefill_worker` holds the KV.
            decode_workers: those that host its model.
            session: that it is a call of.

        Raises:
            NoWorkerError: none of those that could do it is alive.
        """
        hosts = self._generating.among(self.working(decode_workers))
        if not hosts.slots:
            raise NoWorkerError(f"no decode worker of model {sequence.model} is alive")
        decode, num_pages = self._best_decode(sequence, hosts, [], {})
        self._sessions.moved(session, decode.info.name)
        decode.load += num_pages
        self._touch(decode)
        self._assigned[sequence.id] = None, decode, num_pages
        return msgspec.structs.replace(sequence, decode_worker=decode.info.name)

    def forget(self, id: int) -> None:
        """The sequence has ended, or is routed again under another id. Idempotent."""
        assigned = self._assigned.pop(id, None)
        if assigned is not None:
            prefill, decode, num_pages = assigned
            decode.load -= num_pages
            self._touch(decode)
            if prefill is not None:
                prefill.set_pending(id, 0)
                self._touch(prefill)

    def pending(self, worker: str, id: int, tokens: int) -> None:
        """A prefill worker says how much of a sequence it still has to compute."""
        # What is heard of a sequence that has gone on or ended meanwhile is old.
        view = self._prefill.get(worker)
        if view is not None and id in self._assigned:
            view.set_pending(id, tokens)
            self._covering.touch(view)

    def index_changed(self, worker: str, change: IndexChanged) -> bool:
        """A worker's prefix index has changed. Whether it should be asked for a snapshot."""
        views = self._views(worker)
        asks = [view.changed(change) for view in views]
        self._touch(*views)
        self._tell_twin(worker, change.added, change.removed)
        return any(asks)

    def index_snapshot(self, worker: str, snapshot: IndexSnapshot) -> None:
        """A worker says what all its prefix index holds."""
        views = self._views(worker)
        for view in views:
            view.snapshot(snapshot)
        self._touch(*views)
        self._tell_twin(worker, snapshot.keys, [])

    def _tell_twin(self, worker: str, added: list[bytes], removed: list[bytes]) -> None:
        """What has the same pages hears of them, too."""
        views = self._views(self.twin(worker))
        for view in views:
            view.note(added, removed)
        self._touch(*views)

    def store_changed(self, added: list[bytes], removed: list[bytes]) -> None:
        """A prefill worker says which keys the KV store has, and which it has no longer."""
        self._stored.changed(added, removed)

    def note_others(self, worker: str, load: int) -> None:
        """A worker says what it has of sequences that other routers have sent."""
        views = self._views(worker)
        for view in views:
            view.others = load
        self._touch(*views)

    def _views(self, worker: str) -> list[WorkerView]:
        fleets = (self._covering, self._generating)
        return [fleet.views[worker] for fleet in fleets if worker in fleet.views]

    def _touch(self, *views: WorkerView) -> None:
        for view in views:
            for fleet in (self._covering, self._generating):
                if fleet.views.get(view.info.name) is view:
                    fleet.touch(view)

    def _who_can(self, decode_workers: tuple[str, ...], model: str) -> tuple[Among, Among]:
        """Prefill workers that may cover a prompt for these decode workers, and those of the decode
        workers that are nobody's partner.

        Raises:
            NoWorkerError: there is none of a kind.
        """
        found = self._able.get(decode_workers)
        if found is None:
            hosts = {*self.working(decode_workers)} & {*self._decode}
            if not hosts:
                raise NoWorkerError(f"no decode worker of model {model} is alive")
            covering = self.working(self._prefill)
            partners = {name: self._prefill[name].info.partner for name in covering}
            paired = {name for name in hosts if self._decode[name].info.partner}
            alone = self._generating.among(hosts - paired - {*partners.values()})
            able = [n for n, to in partners.items() if (to in hosts if to else alone.slots)]
            if not able:
                raise NoWorkerError("no prefill worker is alive")
            if len(self._able) >= _MAX_ABLE:
                self._able.clear()
            found = self._able[decode_workers] = self._covering.among(able), alone
        return found

    def _is_one(self, name: str, among: Among) -> bool:
        view = self._decode.get(name)
        return view is not None and bool(among.mask >> view.slot & 1)

    def _best_prefill(self, sequence: Sequence, able: Among, last: str) -> tuple[WorkerView, int]:
        """The cheapest worker, or `last` if it is able and not overloaded; and how many tokens it
        would compute."""
        chain, fleet = sequence.chain, self._covering
        page_size = fleet.at(able.slots[0]).info.page_size

        def uncached(run: int) -> int:
            return max(0, sequence.covered - run * page_size)

        def price(run: int) -> int:
            return COMPUTE_WEIGHT * uncached(run)

        if self._policy == "load":
            return self._least_waiting(sequence, able, uncached)
        best = fleet.cheapest(chain, able, price, self._meeting)
        view = fleet.views.get(last)
        if view is not None and able.mask >> view.slot & 1:
            there = fleet.cost(view, fleet.run(view, chain), price)
            if there.total <= best.total + STAY_TOKENS:
                best = there
        return fleet.at(best.slot), uncached(best.run)

    def _least_waiting(
        self, sequence: Sequence, able: Among, uncached: Callable[[int], int]
    ) -> tuple[WorkerView, int]:
        """The cheapest worker where what the KV store has is everywhere, as `_best_prefill`."""
        fleet = self._covering
        page_size = fleet.at(able.slots[0]).info.page_size
        lacking = self._stored.lacking(sequence, page_size)

        def cost(slot: int) -> tuple[int, int, Cost]:
            view = fleet.at(slot)
            run = fleet.run(view, sequence.chain)
            found = fleet.cost(view, run, lambda run: COMPUTE_WEIGHT * min(uncached(run), lacking))
            # Among equals to the one that has most of it.
            return found.total, uncached(run), found

        _, tokens, best = min(map(cost, able.slots))
        return fleet.at(best.slot), min(tokens, lacking)

    def _best_decode(
        self,
        sequence: Sequence,
        hosts: Among,
        last: list[str],
        next_hosts: Mapping[str, int],
    ) -> tuple[WorkerView, int]:
        """The cheapest of the workers that host the model, and the sequence's pages there.

        `last` is where the session was, and stays unless that is overloaded. A model that is asked
        next elsewhere will have the pages moved there, too.
        """
        fleet = self._generating
        num_pages = -(-sequence.num_tokens // fleet.at(hosts.slots[0]).info.page_size)

        def price(run: int) -> int:
            return num_pages - run

        def cost(view: WorkerView) -> Cost:
            here = fleet.cost(view, fleet.run(view, sequence.keys), price)
            elsewhere = most_hosted - next_hosts.get(view.info.name, 0)
            return msgspec.structs.replace(here, total=here.total + elsewhere * num_pages)

        most_hosted = max(next_hosts.values(), default=0)
        if most_hosted:
            best = min(cost(fleet.at(slot)) for slot in hosts.slots)
        else:
            best = fleet.cheapest(sequence.keys, hosts, price, num_pages if self._meeting else 0)
        for name in last:
            view = fleet.views[name]
            if (there := cost(view)).total <= best.total + view.info.num_pages // STAY_SHARE:
                best = there
        return fleet.at(best.slot), num_pages


_MAX_ABLE = 4096
"""Sets of decode workers that are remembered: one a model, as a rule."""
