"""A host of cores without devices, threads or clock: a test says who acts when.

Parts talk over queues, one for each pair of parts, each first in, first out; which queue is
delivered next is the test's choice. Messages, plans and results go through their encoding.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker
from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.balance import BalancePolicy
from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.one_pool import OnePool
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import root_key
from pshare_jax.core.prefetch import Prefetch
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.requests import (
    Owner,
    Request,
    SamplingParams,
    Session,
)
from pshare_jax.core.router import NoWorkerError, Router, WorkerInfo
from pshare_jax.core.sessions import SessionPolicy
from pshare_jax.core.store_client import StoreClient
from tests.core.invariants import check_books, check_idle
from tests.core.reply import Reply
from tests.core.setting import PAGE, Setting, model_specs
from tests.core.symbolic import (
    Link,
    SymbolicConnector,
    SymbolicDecode,
    SymbolicPool,
    SymbolicPrefill,
    module,
    oracle,
    prefill_writer,
)
from tests.core.symbolic_store import PRICES, SymbolicStore, SymbolicStoreEnd

MAX_TTL = 30.0
"""Seconds for which pages may be pinned."""
NOBODY = Owner()


class Host:
    """Cores, their executors, and the messages between them.

    Attributes:
        now: virtual seconds.
        replies: of all requests by id, in order of arrival.
        partner: of each worker the one that uses the same pool, if there is one.
        link: where transfers are told to go wrong.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.now = 0.0
        self.replies: dict[str, Reply] = {}
        self.link = Link()
        self.store = SymbolicStore()
        self.queues: dict[tuple[str, str], deque[bytes | Message | None]] = {}
        self.dead: set[str] = set()
        self.config = DecodeConfig(
            batch_buckets=[1, 2, 4],
            max_num_seqs=setting.max_num_seqs,
            replay_buckets=[4],
            steps_per_dispatch=setting.steps_per_dispatch,
            group_quantum=2,
        )
        names = [f"decode{i}" for i in range(setting.num_decode)]
        self.models = model_specs(names)
        if setting.either:
            own = msgspec.structs.replace(self.models["isolated"], decode_workers=tuple(names))
            self.models["isolated"] = own
        self.prefill: dict[str, PrefillWorker[SymbolicPrefill]] = {}
        self.decode: dict[str, DecodeWorker[SymbolicDecode]] = {}
        self.partner: dict[str, str] = {}
        self._roots: dict[int, bytes] = {}
        self._transfer_ids = itertools.count(1)
        self._build()
        self.router = Router(
            [self._info(name) for name in self.prefill],
            [self._info(name) for name in self.decode],
            lends=setting.lends,
        )
        policy = SessionPolicy(
            setting.reply_ahead,
            max_ttl=MAX_TTL,
            prefetch=setting.prefetched > 0,
            streaming_step=setting.streaming_step,
        )
        balance = BalancePolicy(setting.balanced, setting.max_num_seqs)
        self.dispatcher = Dispatcher(
            self.models, self.router, PAGE, policy, balance if setting.balanced else None
        )

    @property
    def alive(self) -> list[str]:
        """Names of the workers that have not been killed."""
        return [name for name in (*self.prefill, *self.decode) if name not in self.dead]

    @property
    def live(self) -> list[Reply]:
        """Replies that have not ended, oldest first."""
        return [reply for reply in self.replies.values() if reply.reason is None]

    @property
    def pending(self) -> list[tuple[str, str]]:
        """Pairs between which messages are on their way."""
        return [pair for pair, queue in self.queues.items() if queue]

    def submit(
        self,
        model: str,
        prompt: Sequence[int],
        max_tokens: int = 4,
        *,
        salt: str = "",
        end_after: int | None = None,
        logprobs: int | None = None,
        grammar: bool = False,
        owner: Owner = NOBODY,
        session: Session | None = None,
        goes_on: bool = True,
    ) -> Reply:
        """Submits a request; its token number `end_after` will be an end token.

        With a grammar some tokens are forced by those before.
        """
        spec = self.models[model]
        split = spec.split_rule.split(prompt)
        writer = prefill_writer(spec.prefill_weights, root_key(spec.namespace, salt))
        reader = module(spec.group, spec.adapter if split.invoked else -1)
        expected = oracle(writer, reader, prompt, split.covered, max_tokens, (), grammar)
        ends = frozenset(expected[end_after : end_after + 1] if end_after is not None else ())
        first = next((i for i, token in enumerate(expected) if token in ends), max_tokens)
        expected = expected[: first + 1]
        params = SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            grammar=GrammarSpec("json_object") if grammar else None,
        )
        request = Request(
            f"r{len(self.replies)}",
            model,
            tuple(prompt),
            params,
            salt,
            owner=owner,
            session=session or Session(),
            goes_on=goes_on,
        )
        reply = self.replies[request.id] = Reply(request, expected)
        order = len(self.replies)
        self.dispatcher.submit(request, order=order, seed=0, end_token_ids=ends)
        self._collect_dispatcher()
        return reply

    def abort(self, reply: Reply, *, complete: bool = False) -> None:
        """A client has gone, or has got all that it wanted."""
        reply.aborted = True
        self.dispatcher.abort(reply.request.id, complete=complete)
        self._collect_dispatcher()

    def give_mesh(self, name: str) -> bool:
        """Has a mesh work for this worker of it from now on; False if that cannot be."""
        try:
            self.dispatcher.give_mesh(name)
        except NoWorkerError:
            return False
        self._collect_dispatcher()
        return True

    def deliver(self, source: str, to: str) -> None:
        """Delivers the first message from `source` to `to`."""
        data = self.queues[source, to].popleft()
        message = m.decode(data) if isinstance(data, bytes) else data
        if to != DISPATCHER:
            self._receive(to, message)
            self._collect(to)
            return
        if message is None:
            self.dispatcher.lose_worker(source, "killed")
        else:
            self.dispatcher.receive(source, message, self.now)  # type: ignore[arg-type]
        self._collect_dispatcher()

    def deliver_all(self, *names: str) -> None:
        """Delivers what is on its way, and what that brings about; between `names` if given."""
        while pairs := [p for p in self.pending if not names or set(p) <= {*names}]:
            for pair in pairs:
                self.deliver(*pair)

    def work(self, name: str) -> bool:
        """One piece of a worker's work; says whether it got on."""
        worker = self.prefill.get(name) or self.decode[name]
        piece = worker.plan(self.now)
        partner = self.partner.get(name)
        if piece is not None and partner in self.decode:
            self.decode[partner].drain()
        progress = piece() if piece is not None else False
        return self._collect(name) or progress

    def work_ahead(self, name: str) -> bool:
        """A piece of what nobody waits for, which leaves nothing held; says whether there was any.

        As in a thread, nothing of the kind is done where anybody waits; cores have to bear it.
        """
        worker = self.prefill.get(name) or self.decode[name]
        held = worker.cache.counts().used
        piece = worker.plan_ahead()
        if piece is None:
            return False
        assert worker.at_rest
        assert piece()
        assert worker.cache.counts().used == held
        self._collect(name)
        return True

    def kill(self, name: str) -> None:
        """A worker has failed, and with it the one that uses the same pool."""
        for victim in [name, self.partner.get(name)]:
            if victim is None:
                continue
            worker = self.prefill.get(victim) or self.decode[victim]
            worker.release_all()
            worker.cache.check()
            self.dead.add(victim)
            self.link.drop_worker(victim)
            self.queues.setdefault((victim, DISPATCHER), deque()).append(None)
        for (_, to), queue in self.queues.items():
            if to in self.dead:
                queue.clear()

    def round(self) -> bool:
        """Everybody acts once; says whether anything has happened."""
        progress = bool(self.pending)
        self.deliver_all()
        for name in self.alive:
            progress = self.work(name) or progress
            self.deliver_all()
        if progress:
            return True
        return sum(map(self.work_ahead, self.alive)) > 0

    def drain(self, leap: float = 0.5) -> None:
        """Lets all requests end, in a fair order and a bounded number of rounds.

        Where nothing moves, whoever waits, waits for a deadline: time passes by half a second, and
        by twice as much each further time, up to `leap`.
        """
        idle = 0
        for _ in range(600 + 10 * len(self.live)):
            idle = 0 if self.round() else idle + 1
            self.check()
            if idle:
                self.now += min(2.0 ** (idle - 2), leap)
            if idle > 2 and not self.dispatcher.num_live and not self._busy():
                break
            assert idle < 100, f"nothing moves, but {[r.request.id for r in self.live]} wait"
        assert not self.dispatcher.num_live, "too many rounds"
        for reply in self.replies.values():
            reply.check_ended()
        self.check_idle()

    def check(self) -> None:
        """Asserts the invariants that hold between any two actions."""
        check_books(self)

    def check_idle(self) -> None:
        """Asserts that nothing is held, offered, pulled or remembered of requests."""
        check_idle(self)

    def _busy(self) -> bool:
        workers = [self.prefill.get(name) or self.decode[name] for name in self.alive]
        return any(worker.core.held_ids() for worker in workers)

    def _build(self) -> None:
        setting = self.setting
        for i in range(setting.num_decode):
            name = f"decode{i}"
            pool = SymbolicPool(setting.decode_pages, PAGE)
            cache = PageCache(setting.decode_pages, PAGE, setting.pinned_share)
            core = DecodeCore(
                name,
                cache,
                self.models,
                self.config,
                0 if setting.one_pool else 64,
                owns_cache=not (setting.one_pool or setting.either),
                transfer_ids=self._transfer_ids,
            )
            end = SymbolicConnector(name, pool, self.link)
            schedule = None
            if setting.one_pool or setting.either:
                schedule = self._pair(i, core, end)
            executor = SymbolicDecode(end, self.config)
            self.decode[name] = DecodeWorker(core, executor, schedule, setting.steps_ahead)
        for i in range(0 if setting.one_pool or setting.either else setting.prefill):
            name = f"prefill{i}"
            pool = SymbolicPool(setting.prefill_pages, PAGE)
            cache = PageCache(setting.prefill_pages, PAGE, setting.pinned_share)
            core = PrefillCore(
                name,
                cache,
                self.models,
                self.setting.chunk_buckets,
                transfer_ids=self._transfer_ids,
            )
            if setting.unasked:
                core.offer_unasked()
            end = SymbolicConnector(name, pool, self.link)
            self.prefill[name] = PrefillWorker(core, self._prefill_executor(end))
        for name, worker in self.prefill.items():
            if setting.store:
                client = StoreClient(worker.cache, PRICES, self._transfer_ids)
                if setting.prefetched:
                    client.ahead = Prefetch(client, worker.cache, setting.prefetched, 1)
                worker.core.store = client
                worker.executor.store = SymbolicStoreEnd(
                    worker.executor.pool,
                    self.store,
                    lambda message, name=name: self._post("store", name, message),
                )

    def _pair(self, index: int, decode: DecodeCore, end: SymbolicConnector) -> Any:
        """A prefill worker over a decode core's pool; returns how the decode core is scheduled."""
        name = f"prefill{index}"
        core = PrefillCore(name, decode.cache, self.models, self.setting.chunk_buckets)
        pool = OnePool(core, decode)
        executor = self._prefill_executor(SymbolicConnector(name, end.pool, self.link))
        self.prefill[name] = PrefillWorker(core, executor, pool.schedule_prefill)
        self.partner |= {name: decode.name, decode.name: name}
        return pool.schedule_decode

    def _prefill_executor(self, end: SymbolicConnector) -> SymbolicPrefill:
        return SymbolicPrefill(end, [*self.setting.chunk_buckets], self._roots.__getitem__)

    def _info(self, name: str) -> WorkerInfo:
        worker = self.prefill.get(name) or self.decode[name]
        other, pages = self.partner.get(name, ""), worker.cache.num_usable
        if self.setting.either:
            prefills = int(name.removeprefix("prefill").removeprefix("decode"))
            rests = (prefills < self.setting.prefill) != (name in self.prefill)
            return WorkerInfo(name, pages, PAGE, twin=other, rests=rests)
        return WorkerInfo(name, pages, PAGE, other if name in self.prefill else "")

    def _receive(self, to: str, message: Any) -> None:
        if to in self.dead:
            return
        if isinstance(message, m.Prefill | m.Replied):
            self._roots[message.sequence.id] = message.sequence.root
        (self.prefill.get(to) or self.decode[to]).receive(message)

    def _collect(self, name: str) -> bool:
        """Takes what workers have to say; those of one pool hear each other at once."""
        spoke, together = False, [name, self.partner.get(name)]
        workers = [self.prefill.get(n) or self.decode[n] for n in together if n is not None]
        while any(worker.outbox for worker in workers):
            for worker in workers:
                while worker.outbox:
                    spoke = True
                    to, message = worker.outbox.pop(0)
                    if to in together:
                        self._receive(to, m.decode(m.encode(message)))
                    else:
                        self._post(worker.name, to, message)
        return spoke

    def _collect_dispatcher(self) -> None:
        messages, self.dispatcher.outbox = self.dispatcher.outbox, []
        outputs, self.dispatcher.outputs = self.dispatcher.outputs, []
        for to, message in messages:
            self._post(DISPATCHER, to, message)
        for output in outputs:
            self.replies[output.request_id].take(output)

    def _post(self, source: str, to: str, message: Message) -> None:
        if to not in self.dead:
            data = m.encode(message) if self.setting.wire else message
            self.queues.setdefault((source, to), deque()).append(data)
