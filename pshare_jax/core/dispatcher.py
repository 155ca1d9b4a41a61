"""The dispatcher core: requests, the attempts at them, and what workers say of these.

Each attempt is a sequence with an id of its own, so that what a worker still says of an earlier
one is recognised as stale and dropped. Tokens are delivered once: an attempt begins with those that
earlier ones have delivered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from pshare_jax.core import attempt_end
from pshare_jax.core import messages as m
from pshare_jax.core.balance import BalancePolicy
from pshare_jax.core.foresight import Foresight
from pshare_jax.core.live_request import LiveRequest
from pshare_jax.core.messages import Outbox, ToDispatcher
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.parked import Parked
from pshare_jax.core.requests import FinishReason, Request, RequestOutput, TokenLogprobs
from pshare_jax.core.roles import Roles
from pshare_jax.core.router import NoWorkerError, Router, WorkerInfo
from pshare_jax.core.sequences import Moved
from pshare_jax.core.served_models import ServedModels
from pshare_jax.core.sessions import SessionPolicy, session_key
from pshare_jax.core.stats import DispatcherStats

MAX_LOST_ATTEMPTS = 3
"""Attempts that may be lost to failures before the request fails; preemptions do not count."""


class Dispatcher:
    """Turns requests into sequences, routes them, and turns what workers say into outputs.

    Args:
        models: the served models by name.
        router: chooses workers.
        page_size: tokens of a page.
        sessions: what is done for calls to come.
        balance: when meshes that may do either change; None is never by themselves.
        ids: of attempts, never used twice by anybody whom the workers hear.
        max_lost: attempts that may be lost to failures before a request fails.
        patience: seconds that a request waits for a worker to come where none could do it; see
            `tick`. 0 is not at all.

    Attributes:
        outbox: messages to workers; who carries them empties it.
        outputs: events of requests, in order; who delivers them empties it.
        stats: what has become of requests.
        retired: models that have gone, and of which no request is left; who frees what they had
            empties it.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        router: Router,
        page_size: int,
        sessions: SessionPolicy | None = None,
        balance: BalancePolicy | None = None,
        *,
        ids: Iterator[int] | None = None,
        max_lost: int = MAX_LOST_ATTEMPTS,
        patience: float = 0.0,
    ):
        self.outbox: Outbox = []
        self.outputs: list[RequestOutput] = []
        self.stats = DispatcherStats()
        self.retired: list[ModelSpec] = []
        self._models = ServedModels(models)
        self._router = router
        self._page_size = page_size
        self._sessions = sessions or SessionPolicy()
        self._ids = itertools.count() if ids is None else ids
        self._foresight = Foresight(self._sessions, page_size, self._ids)
        self._roles = Roles(router, balance)
        self._live: dict[str, LiveRequest] = {}
        self._attempts: dict[int, LiveRequest] = {}
        self._max_lost = max_lost
        self._patience = patience
        self._lost_workers: dict[str, str] = {}
        self._parked = Parked(patience)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def set_model(self, name: str, spec: ModelSpec) -> None:
        """Serves a model under `name` from now on; requests to what had that name go on with it."""
        self.remove_model(name)
        self._models.set(name, spec)
        self.outbox += [(worker, m.ModelAdded(spec)) for worker in self._router.workers]

    def remove_model(self, name: str) -> None:
        """Serves nothing under `name` any more, once the requests that it has have ended."""
        self._retire(self._models.remove(name))

    def hold(self, name: str) -> ModelSpec | None:
        """What is served under `name`; it stays until `release`. None if there is nothing."""
        spec = self._models.find(name)
        if spec is not None:
            self._models.use(spec)
        return spec

    def release(self, spec: ModelSpec) -> None:
        """The counterpart of `hold`."""
        self._retire(self._models.leave(spec))

    def submit(
        self,
        request: Request,
        *,
        order: int,
        seed: int,
        end_token_ids: frozenset[int],
        model: ModelSpec | None = None,
        now: float = 0.0,
    ) -> None:
        """Takes a request, whose id must not be in use.

        Args:
            request: checked already.
            order: of arrival.
            seed: of its random draws.
            end_token_ids: tokens that end it.
            model: one that is held; None is what the request's model is at present.
            now: seconds of the host's clock.
        """
        model = self._models.find(request.model) if model is None else model
        if model is None:
            error = f"model {request.model} was unloaded"
            self.outputs.append(
                RequestOutput(request.id, finish_reason=FinishReason.ERROR, error=error)
            )
            return
        self._models.use(model)
        live = LiveRequest.of(
            request,
            model,
            self._page_size,
            order=order,
            seed=seed,
            end_token_ids=end_token_ids,
            now=now,
        )
        self._live[request.id] = live
        self._attempt(live)
        self._foresight.asked(live)
        self._say_ahead(live, self._foresight.expected(live))

    def routed(self, request_id: str, now: float) -> None:
        """Notes when a request that was just submitted had its workers; for who has a clock."""
        if (live := self._live.get(request_id)) is not None:
            live.times.routed = now

    def abort(self, request_id: str, *, complete: bool = False) -> None:
        """Ends a request; unknown and ended ones are ignored.

        A reply that is `complete` is all that was wanted, and the next prompt may go on from it.
        """
        live = self._live.get(request_id)
        if live is None or live.aborted:
            return
        live.aborted = True
        if complete:
            self._say_ahead(live, self._foresight.reply(live))
        if live.sequence is None:
            self._finish(live, FinishReason.ABORT)
            return
        self.outbox += attempt_end.aborted(live, self._lost_workers)

    def fail_all(self, error: str) -> None:
        """Ends all requests with an error."""
        for live in tuple(self._live.values()):
            self._finish(live, FinishReason.ERROR, error)

    def receive(self, worker: str, message: ToDispatcher, now: float = 0.0) -> None:
        """Takes in what a worker says; `now` is in seconds of the host's clock."""
        self.outbox += self._roles.balance(self._models.all_hosts, now)
        match message:
            case m.IndexChanged():
                if self._router.index_changed(worker, message):
                    self.outbox.append((worker, m.IndexWanted()))
            case m.IndexSnapshot():
                self._router.index_snapshot(worker, message)
            case m.StoreChanged(added, removed):
                self._router.store_changed(added, removed)
            case m.Pending(id, tokens):
                self._router.pending(worker, id, tokens)
                if (live := self._attempts.get(id)) is not None:
                    live.hear_pending(tokens, now)
            case _:
                live = self._attempts.get(message.id)
                if live is not None:
                    self._about(live, message, now)

    def is_current(self, id: int) -> bool:
        """Whether a sequence is what its request goes on with; another thread may ask."""
        return id in self._attempts

    def needs(self, worker: str) -> bool:
        """Whether any sequence waits for something of a worker."""
        return any(attempt_end.needs(live, worker) for live in self._live.values())

    def running(self) -> Counter[str]:
        """Sequences that have a slot, by the model's id; another thread may ask."""
        lives = tuple(self._live.values())
        return Counter(e.model.name for e in lives if e.started and not e.request.probe)

    def add_worker(self, info: WorkerInfo, *, prefill: bool, models: Collection[str] = ()) -> None:
        """A worker has come, or come again; it holds nothing that was sent there before.

        Args:
            info: what the router is told.
            prefill: whether it covers prompts; otherwise it generates.
            models: names of the models that it generates for, beside those that say so.
        """
        self._lost_workers.pop(info.name, None)
        self._models.hosted(info.name, models)
        self._router.add(info, prefill=prefill)
        self._try_again()

    def set_hosted(self, worker: str, models: Collection[str]) -> None:
        """A worker that is here generates for these models now, beside those that say so."""
        self._models.hosted(worker, models)
        self._try_again()

    def _try_again(self) -> None:
        """Who waits for a worker may find one now."""
        for id in self._parked.ids():
            self._attempt(self._live[id])

    def note_others(self, worker: str, load: int) -> None:
        """A worker says what it has of other dispatchers' sequences, see `Router.note_others`."""
        self._router.note_others(worker, load)

    def drain_worker(self, worker: str) -> None:
        """A worker takes no more sequences; those that it has go on."""
        self._router.lose(worker)

    def tick(self, now: float) -> None:
        """Gives up on requests that have waited too long for a worker; `now` is in seconds."""
        for id in self._parked.expired(now):
            live = self._live[id]
            self._finish(live, FinishReason.ERROR, self._no_worker(live.model))

    def lose_worker(self, worker: str, reason: str) -> None:
        """A worker has failed: what it held is computed elsewhere, or fails."""
        self._lost_workers[worker] = reason
        self._router.lose(worker)
        self.outbox += self._roles.wake(self._models.all_hosts())
        for live in tuple(self._live.values()):
            if attempt_end.needs(live, worker):
                self.outbox += attempt_end.bereaved(live, worker, self._lost_workers)
                self._retry(live, f"{worker}: {reason}")

    def _about(self, live: LiveRequest, message: m.OfAttempt, now: float) -> None:
        match message:
            case m.Started(_, usage):
                live.hear_started(usage, now)
            case m.Tokens(_, tokens, logprobs, reason):
                self._deliver(live, tokens, logprobs, reason)
            case m.Returned(_, cause, detail):
                if cause == "moved":
                    self._move(live, message.moved)
                elif cause == "preempted":
                    self._attempt(live)
                else:
                    # What cannot be had from one worker is got from another, if there is one.
                    live.avoided |= {live.sequence.prefill_worker} if live.sequence else set()
                    self._retry(live, detail)
            case m.Dropped():
                self._finish(live, FinishReason.ABORT)
            case m.Failed(_, error):
                self._finish(live, FinishReason.ERROR, error)

    def give_mesh(self, worker: str) -> None:
        """Has a mesh that may do either work for `worker` from now on, see `Roles.give`.

        Raises:
            NoWorkerError: see there.
        """
        self.outbox += self._roles.give(worker, self._models.all_hosts())

    def _move(self, live: LiveRequest, moved: Moved | None) -> None:
        """A sequence goes on elsewhere, with the KV that it has if it takes any along."""
        before, usage = live.sequence, live.usage
        if moved is None or before is None or usage is None or live.aborted:
            if moved is not None:
                self.outbox.append((moved.worker, m.Release(moved.id)))
            self._attempt(live)
            return
        self._leave(live)
        sequence = live.moving(before, next(self._ids), moved)
        try:
            hosts, key = self._models.hosts(live.model), session_key(live.request)
            sequence = self._router.move(sequence, hosts, key)
        except NoWorkerError:
            self.outbox.append((moved.worker, m.Release(moved.id)))
            self._attempt(live)
            return
        live.begin(sequence)
        self._attempts[sequence.id] = live
        self.outbox.append((sequence.decode_worker, m.Covered(sequence, usage)))

    def _attempt(self, live: LiveRequest) -> None:
        """Routes a request (again), with what is known of it."""
        self._leave(live)
        if live.aborted:
            self._finish(live, FinishReason.ABORT)
            return
        sequence = live.attempt(next(self._ids), self._sessions.max_ttl)
        request = live.request
        try:
            hosts = self._models.hosts(live.model)
            coming = self._models.hosts_of_names(request.session.next_models)
            session = session_key(request)
            sequence = self._router.route(sequence, hosts, session, coming, live.avoided)
        except NoWorkerError as error:
            if self._patience:
                live.sequence = None
                self._parked.add(request.id)
            else:
                self._finish(live, FinishReason.ERROR, self._no_worker(live.model, error))
            return
        self._parked.drop(request.id)
        live.begin(sequence)
        self._attempts[sequence.id] = live
        self.outbox.append((sequence.prefill_worker, m.Prefill(sequence)))

    def _no_worker(self, model: ModelSpec, error: NoWorkerError | None = None) -> str:
        causes = "; ".join(f"{name}: {why}" for name, why in self._lost_workers.items())
        what = error or f"no worker of model {model.name} has come"
        return f"{what} ({causes})"

    def _say_ahead(self, live: LiveRequest, messages: list[m.Expected] | list[m.Replied]) -> None:
        """Tells the worker that has covered a prompt what to do for what comes after it."""
        sequence = live.sequence
        if sequence is not None and sequence.prefill_worker not in self._lost_workers:
            self.outbox += [(sequence.prefill_worker, message) for message in messages]

    def _retry(self, live: LiveRequest, reason: str) -> None:
        live.lost += 1
        if live.aborted or live.lost < self._max_lost:
            self._attempt(live)
        else:
            self._finish(live, FinishReason.ERROR, f"tried {live.lost} times; {reason}")

    def _leave(self, live: LiveRequest) -> None:
        if live.sequence is not None:
            self._attempts.pop(live.sequence.id, None)
            self._router.forget(live.sequence.id)

    def _deliver(
        self,
        live: LiveRequest,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
    ) -> None:
        live.output += tokens
        event = live.event(tokens, logprobs, reason)
        if reason is not None:
            self._say_ahead(live, self._foresight.reply(live))
            self._say_ahead(live, self._foresight.expected(live))
            self._end(live, reason)
        elif self._foresight.is_due(live):
            live.told = len(live.output)
            self._say_ahead(live, self._foresight.reply(live))
        self.outputs.append(event)

    def _finish(self, live: LiveRequest, reason: FinishReason, error: str | None = None) -> None:
        event = live.event(reason=reason, error=error)
        self._end(live, reason)
        self.outputs.append(event)

    def _end(self, live: LiveRequest, reason: FinishReason) -> None:
        self._leave(live)
        del self._live[live.request.id]
        self._parked.drop(live.request.id)
        self.release(live.model)
        if not live.request.probe:
            self.stats.ended(live.request.model, reason, len(live.request.prompt_token_ids))

    def _retire(self, spec: ModelSpec | None) -> None:
        """A model that was removed is used by nobody any more."""
        if spec is not None:
            self.outbox += [(worker, m.ModelRemoved(spec.name)) for worker in self._router.workers]
            self.retired.append(spec)
