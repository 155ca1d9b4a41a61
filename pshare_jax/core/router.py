"""Which prefill worker covers a prompt, and which decode worker generates.

A prefill worker costs the tokens that wait there, plus twice the tokens of this prompt that it
would have to compute: those delay this prompt as waiting does, and all others besides. So a
session stays with the worker that has its context, and prompts that come at once for several
models meet on one worker, until that is behind by more than the context is worth. A decode worker
costs the pages that its sequences read in each step, plus the pages that it would have to receive.
(The costs are in the manner of NVIDIA Dynamo's KV router.)

The router knows workers by what they have said: which keys entered and left their prefix indexes,
and how many prompt tokens wait. It may be wrong for a moment; then something is computed twice.

With the policy `load` what the KV store has counts as held by every worker. So a prompt that is
known goes where least waits, whoever has computed it; among equals to the one whose pool holds most
of it. One that the store does not have yet is routed by prefix. Sessions do not stay anywhere.

A session stays where it was unless that is overloaded, that is, costs more than elsewhere by more
than its further calls are worth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import msgspec

from pshare_jax.config import RoutingPolicy
from pshare_jax.core.messages import Sequence
from pshare_jax.core.sessions import SessionKey, SessionTable

COMPUTE_WEIGHT = 2
"""What computing a token costs, in tokens of waiting."""

STAY_TOKENS = 1024
"""Tokens of waiting that a session bears to stay with its prefill worker."""

MAX_STORED = 2**18
"""Keys that the KV store is known to have; those that were heard of first are forgotten."""

STAY_SHARE = 4
"""A session stays with a decode worker that has more to read, up to this part of its pool."""


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as the router sees it.

    Args:
        name: of the worker.
        num_pages: what its pool can hold.
        page_size: tokens of a page.
        partner: of a prefill worker that shares its pool with a decode worker: that one, which
            then generates for all prompts that are covered there.
        twin: the worker of the other kind on the same mesh, where a mesh may do either: one of the
            two works, or while it changes both, and they have the same pages.
        rests: whether it is the one that does not.
    """

    name: str
    num_pages: int
    page_size: int
    partner: str = ""
    twin: str = ""
    rests: bool = False


class NoWorkerError(Exception):
    """No worker that could do it is alive; says which were asked for."""


@dataclass(eq=False)
class _Worker:
    """`sent` are keys of prompts that were sent there, since their KV will soon be there;
    `pending` prompt tokens still to be computed, by sequence."""

    info: WorkerInfo
    held: set[bytes] = field(default_factory=set)
    sent: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    pending: dict[int, int] = field(default_factory=dict)
    pending_tokens: int = 0
    load: int = 0

    def set_pending(self, id: int, tokens: int) -> None:
        self.pending_tokens += tokens - self.pending.pop(id, 0)
        if tokens:
            self.pending[id] = tokens

    def remember(self, chain: Iterable[bytes]) -> None:
        for key in chain:
            self.sent[key] = None
            self.sent.move_to_end(key)
        while len(self.sent) > self.info.num_pages:
            self.sent.popitem(last=False)

    def held_tokens(self, keys: Sequence_[bytes]) -> int:
        """Leading tokens whose full pages the worker has said to hold."""
        return self.info.page_size * _run(keys, self.held)


class Router:
    """Routes sequences; remembers where prompts were sent.

    Args:
        prefill: the prefill workers.
        decode: the decode workers.
        policy: how prefill workers are chosen.
    """

    def __init__(
        self,
        prefill: Sequence_[WorkerInfo],
        decode: Sequence_[WorkerInfo],
        policy: RoutingPolicy = "prefix",
    ):
        self._policy = policy
        self._stored: OrderedDict[bytes, None] = OrderedDict()
        self._prefill = {info.name: _Worker(info) for info in prefill}
        self._decode = {info.name: _Worker(info) for info in decode}
        self._resting = {info.name for info in (*prefill, *decode) if info.rests}
        self._twins = {info.name: info.twin for info in (*prefill, *decode) if info.twin}
        self._assigned: dict[int, tuple[str, str, int]] = {}
        self._sessions = SessionTable()

    @property
    def workers(self) -> list[str]:
        """Names of the workers that are alive."""
        return [*self._prefill, *self._decode]

    @property
    def prefill_workers(self) -> list[str]:
        """Names of the prefill workers that are alive."""
        return list(self._prefill)

    def twin(self, worker: str) -> str:
        """The other worker of a mesh that may do either, or nothing."""
        return self._twins.get(worker, "")

    def working(self, names: Iterable[str]) -> list[str]:
        """Those of some workers that are alive and take sequences."""
        alive = (*self._prefill, *self._decode)
        return [name for name in names if name in alive and name not in self._resting]

    def loads(self) -> tuple[dict[str, int], dict[str, int]]:
        """Prompt tokens that wait, by prefill worker that works, and covered sequences by decode
        worker that does."""
        waiting = {n: self._prefill[n].pending_tokens for n in self.working(self._prefill)}
        sequences = dict.fromkeys(self.working(self._decode), 0)
        pending = {id for worker in self._prefill.values() for id in worker.pending}
        for id, (_, decode, _) in self._assigned.items():
            if decode in sequences and id not in pending:
                sequences[decode] += 1
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

    def route(
        self,
        sequence: Sequence,
        decode_workers: Iterable[str],
        session: SessionKey | None = None,
        next_hosts: Mapping[str, int] | None = None,
    ) -> Sequence:
        """The sequence with its workers and `num_uncached`.

        Args:
            sequence: a new attempt.
            decode_workers: those that host its model.
            session: that it is a call of.
            next_hosts: how many of the models that will be asked next a decode worker hosts.

        Raises:
            NoWorkerError: none of those that could do it is alive.
        """
        hosts = self.working(decode_workers)
        working = self.working(self._prefill)
        partners = {name: self._prefill[name].info.partner for name in working}
        able = [name for name, partner in partners.items() if not partner or partner in hosts]
        if not hosts:
            raise NoWorkerError(f"no decode worker of model {sequence.model} is alive")
        if not able:
            raise NoWorkerError("no prefill worker is alive")
        stay = self._sessions.find(session)
        prefill, uncached = self._best_prefill(sequence, able, stay.prefill if stay else "")
        if partners[prefill]:
            hosts = [partners[prefill]]
        latest = [name for name in reversed(stay.decode) if name in hosts] if stay else []
        decode, num_pages = self._best_decode(sequence, hosts, latest[:1], next_hosts or {})
        self._sessions.went(session, prefill, decode)
        self._prefill[prefill].set_pending(sequence.id, uncached)
        self._prefill[prefill].remember(sequence.chain)
        self._decode[decode].load += num_pages
        self._assigned[sequence.id] = prefill, decode, num_pages
        return msgspec.structs.replace(
            sequence, prefill_worker=prefill, decode_worker=decode, num_uncached=uncached
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
        hosts = self.working(decode_workers)
        if not hosts:
            raise NoWorkerError(f"no decode worker of model {sequence.model} is alive")
        decode, num_pages = self._best_decode(sequence, hosts, [], {})
        self._sessions.moved(session, decode)
        self._decode[decode].load += num_pages
        self._assigned[sequence.id] = "", decode, num_pages
        return msgspec.structs.replace(sequence, decode_worker=decode)

    def forget(self, id: int) -> None:
        """The sequence has ended, or is routed again under another id. Idempotent."""
        prefill, decode, num_pages = self._assigned.pop(id, ("", "", 0))
        if prefill in self._prefill:
            self._prefill[prefill].set_pending(id, 0)
        if decode in self._decode:
            self._decode[decode].load -= num_pages

    def pending(self, worker: str, id: int, tokens: int) -> None:
        """A prefill worker says how much of a sequence it still has to compute."""
        # What is heard of a sequence that has gone on or ended meanwhile is old.
        if id in self._assigned and worker in self._prefill:
            self._prefill[worker].set_pending(id, tokens)

    def index_changed(self, worker: str, added: list[bytes], removed: list[bytes]) -> None:
        """Keys have entered and then others left a worker's prefix index."""
        for name in (worker, self.twin(worker)):
            for workers in (self._prefill, self._decode):
                if name in workers:
                    held = workers[name].held
                    held.update(added)
                    held.difference_update(removed)

    def store_changed(self, added: list[bytes], removed: list[bytes]) -> None:
        """A prefill worker says which keys the KV store has, and which it has no longer."""
        for key in added:
            self._stored[key] = None
            self._stored.move_to_end(key)
        for key in removed:
            self._stored.pop(key, None)
        while len(self._stored) > MAX_STORED:
            self._stored.popitem(last=False)

    def lose(self, worker: str) -> None:
        """A worker is not alive any more."""
        self._prefill.pop(worker, None)
        self._decode.pop(worker, None)

    def _best_prefill(self, sequence: Sequence, able: list[str], last: str) -> tuple[str, int]:
        """The cheapest worker, or `last` if it is able and not overloaded; and how many tokens it
        would compute."""
        uncached = {name: self._num_uncached(self._prefill[name], sequence) for name in able}
        if self._policy == "load":
            lacking = self._not_stored(sequence)
            computed = {name: min(tokens, lacking) for name, tokens in uncached.items()}

            def load(name: str) -> tuple[int, int, int]:
                worker = self._prefill[name]
                waiting = COMPUTE_WEIGHT * computed[name] + worker.pending_tokens
                return waiting, uncached[name], len(worker.sent)

            best = min(able, key=load)
            return best, computed[best]

        def cost(name: str) -> tuple[int, int]:
            worker = self._prefill[name]
            # Among equals the emptiest pool, so that new sessions spread.
            return COMPUTE_WEIGHT * uncached[name] + worker.pending_tokens, len(worker.sent)

        best = min(able, key=cost)
        if last in able and cost(last)[0] <= cost(best)[0] + STAY_TOKENS:
            best = last
        return best, uncached[best]

    def _not_stored(self, sequence: Sequence) -> int:
        """Prompt tokens whose KV the store is not known to have."""
        if sequence.last_key in self._stored:
            return 0
        size = next(iter(self._prefill.values())).info.page_size
        return sequence.covered - size * _run(sequence.keys, self._stored)

    def _num_uncached(self, worker: _Worker, sequence: Sequence) -> int:
        if sequence.last_key in worker.sent:
            return 0
        coming = worker.info.page_size * _run(sequence.keys, worker.sent)
        return sequence.covered - max(worker.held_tokens(sequence.keys), coming)

    def _best_decode(
        self,
        sequence: Sequence,
        hosts: list[str],
        last: list[str],
        next_hosts: Mapping[str, int],
    ) -> tuple[str, int]:
        """The cheapest of the workers that host the model, and the sequence's pages there.

        `last` is where the session was, and stays unless that is overloaded. A model that is asked
        next elsewhere will have the pages moved there, too.
        """

        def num_pages(name: str) -> int:
            return -(-sequence.num_tokens // self._decode[name].info.page_size)

        def cost(name: str) -> int:
            worker = self._decode[name]
            held = worker.held_tokens(sequence.keys) // worker.info.page_size
            elsewhere = most_hosted - next_hosts.get(name, 0)
            return worker.load + num_pages(name) - held + elsewhere * num_pages(name)

        most_hosted = max(next_hosts.values(), default=0)
        best = min(hosts, key=cost)
        for name in last:
            if cost(name) <= cost(best) + self._decode[name].info.num_pages // STAY_SHARE:
                best = name
        return best, num_pages(best)


def _run(keys: Sequence_[bytes], known: Iterable[bytes]) -> int:
    """How many of the first keys are known, up to the first that is not."""
    for count, key in enumerate(keys):
        if key not in known:
            return count
    return len(keys)
