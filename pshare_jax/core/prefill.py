"""The prefill core: covers prompts with KV and holds the pages until they have been fetched.

A prompt waits for pages (`queue`), is covered chunk by chunk (`chunks`), and then held until the
decode worker has what it lacks (`held`). When there is nothing else to do, replies are covered that
the next prompts will begin with: see `reply_prefill`.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequence_

import msgspec

from pshare_jax.core import messages as m
from pshare_jax.core.chunk_planner import ChunkPlanner, chunks_of
from pshare_jax.core.index_feed import IndexFeed
from pshare_jax.core.messages import DISPATCHER, Message, Outbox
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import PrefillPlan, PrefillResult, StorePlan
from pshare_jax.core.prefill_queue import PrefillQueue
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.prefill_transfers import PrefillTransfers
from pshare_jax.core.reply_prefill import ReplyPrefill
from pshare_jax.core.stats import PrefillStats
from pshare_jax.core.store_client import StoreClient

STORE_SECONDS = 0.01
"""Between two looks at the deadlines of what was asked of the KV store."""

MAX_TRIES = 2
"""Calls in which a chunk may fail before its request does."""


class PrefillCore:
    """Covers prompts in the pages of one pool.

    Args:
        name: of the worker.
        cache: the pages; shared with a decode core where both use one pool.
        models: the served models by name.
        chunk_buckets: compiled chunk lengths, in tokens; the largest holds at least one page.
        pads: whether rows of a call are computed though nothing is in them.
        transfer_ids: see `Borrowing`.

    Attributes:
        outbox: messages to others; who carries them empties it.
        stats: what has been done.
        queue: prompts that wait for pages.
        chunks: prompts that are being covered.
        held: prompts that are covered.
        index_feed: what routers are told of its index.
        loans: pages that other workers get.
        borrowing: prompts for which pages come from other workers.
        store: its side of the KV store, if there is one.
        rests: whether no prompts are taken, since the mesh does something else.
    """

    def __init__(
        self,
        name: str,
        cache: PageCache,
        models: Mapping[str, ModelSpec],
        chunk_buckets: Sequence_[int],
        *,
        pads: bool = True,
        transfer_ids: Iterator[int] | None = None,
    ):
        self.name = name
        self.cache = cache
        self.outbox: Outbox = []
        self.stats = PrefillStats()
        ids = transfer_ids or (secrets.randbits(63) for _ in itertools.count())
        self._transfers = PrefillTransfers(name, cache, self.outbox, ids, self.stats)
        self.held, self.loans = self._transfers.held, self._transfers.loans
        self.borrowing = self._transfers.borrowing
        self.queue = PrefillQueue(cache)
        self.index_feed = IndexFeed(cache)
        self.store: StoreClient | None = None
        self.rests = False
        self._models = dict(models)
        self.chunks = ChunkPlanner(cache, self._models, chunk_buckets, pads=pads)
        self._replies = ReplyPrefill(cache, self._models, sorted(chunk_buckets), self.stats)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for pages that are there."""
        return self._transfers.urgent or (self.store is not None and self.store.urgent)

    @property
    def computes(self) -> bool:
        """Whether the next plan may have chunks; what comes from elsewhere may bring more."""
        return bool(self.queue.tasks or self.chunks.active)

    @property
    def patience(self) -> float | None:
        """Seconds after which `schedule` should be called again though nothing was heard."""
        store = STORE_SECONDS if self.store is not None and self.store.waits else None
        waits = [seconds for seconds in (self._transfers.patience, store) if seconds is not None]
        return min(waits, default=None)

    def offer_unasked(self) -> None:
        """Has decode workers that have a pool of their own offered what they lack before they ask
        for it, see `core.unasked`."""
        self._transfers.offer_unasked()

    def receive(self, message: Message) -> None:
        """Takes a message in."""
        match message:
            case m.Prefill(sequence) if self.rests:
                self._send(DISPATCHER, m.Returned(sequence.id, "moved"))
            case m.Prefill(sequence):
                self._enter(PrefillTask(sequence))
            case m.SetRole(works, anew):
                self.rests = not works
                if self.rests or anew:
                    self._let_waiting_go()
            case m.Abort(id, decode_worker):
                self._abort(id, decode_worker)
            case m.Release(id, worker, reader):
                if worker and self.held.unasked is not None:
                    self.held.unasked.heard_of(worker, reader)
                self._release(id)
            case m.Fetch() | m.Lend() | m.Repaid() | m.Offered() | m.NotOffered():
                self._transfers.hear(message)
            case m.IndexWanted():
                self._send(DISPATCHER, self.index_feed.snapshot())
            case m.Replied():
                self._replies.hear(message)
            case m.Expected(sequence):
                if self.store is not None and self.store.ahead is not None:
                    self.store.ahead.expect(sequence)
            case m.ModelAdded(spec):
                self._models[spec.name] = spec
            case m.ModelRemoved(model):
                self._models.pop(model, None)
            case m.Looked() | m.Loaded() | m.Stored() if self.store is not None:
                self._hear(self.store, message)
            case _:
                raise TypeError(f"{self.name}: {type(message).__name__} is not for prefill workers")

    def schedule(self, now: float = 0.0) -> PrefillPlan | None:
        """The next piece of work, or None; `now` is in seconds, from any start.

        Pages that somebody waits for come alone, so that they do not wait for a chunk.
        """
        self.cache.tick(now)
        self._replies.pin_heard()
        withdrawn = self._transfers.take_withdrawn()
        if (plan := self._transfers.plan(now, withdrawn)) is not None:
            return plan
        store, alone = self._store_plan(now)
        if store is not None and alone:
            return PrefillPlan(withdrawn=withdrawn, store=store)
        batch = self._batch()
        store = self._with_looks(store)
        self._publish()
        if not batch:
            # An empty plan has the executor look at what it pulls.
            some = withdrawn or store or self.borrowing.is_pulling
            return PrefillPlan(withdrawn=withdrawn, store=store) if some else None
        return PrefillPlan(
            withdrawn=withdrawn,
            copies=self.chunks.take_copies(),
            weights=self.chunks.weights(batch[0]),
            shape=self.chunks.shape(batch),
            chunks=chunks_of(batch),
            store=store,
        )

    def schedule_ahead(self) -> PrefillPlan | None:
        """A chunk of a reply that nobody asks for yet; None while anybody waits for anything."""
        if self.queue.tasks or self.chunks.active or self.held or self.held.wanted:
            return None
        if self.borrowing.waits or (self.store is not None and self.store.waits):
            return None
        plan = self._replies.plan()
        self._publish()
        return plan

    def apply(self, plan: PrefillPlan, result: PrefillResult) -> None:
        """Takes in what came of a plan."""
        if self._replies.apply(plan, result):
            self._publish()
            return
        self._transfers.apply(plan, result)
        if plan.store is not None and self.store is not None:
            self.store.landed(plan.store)
        planned = {chunk.id for chunk in plan.chunks}
        for task in tuple(self.chunks.active):
            if task.sequence.id in planned and task.planned is not None:
                self._computed(task, result.failed.get(task.sequence.id))
        self._publish()

    def release_all(self) -> None:
        """Gives all pages back, of sequences that nobody will end."""
        held = self._transfers.release_all()
        for task in (*self.queue.tasks, *self.chunks.active, *held):
            self.cache.release(task.pages)
        if self.store is not None:
            self.store.release_all()
        self.queue.tasks.clear()
        self.chunks.active.clear()
        self._replies.clear()
        self.outbox.clear()

    def _send(self, to: str, message: Message) -> None:
        self.outbox.append((to, message))

    def _let_waiting_go(self) -> None:
        """Gives back prompts of which nothing has been computed here."""
        looked_for = self.store.ids() if self.store is not None else set[int]()
        waiting = {task.sequence.id for task in self.queue.tasks}
        self.queue.tasks.clear()
        for task in tuple(self.chunks.active):
            if not task.computed and task.planned is None:
                self.chunks.active.remove(task)
                self.cache.release(task.pages)
                waiting.add(task.sequence.id)
        for id in looked_for:
            if self.store is not None and (task := self.store.abort(id)) is not None:
                self.cache.release(task.pages)
                waiting.add(id)
        for id in sorted(waiting):
            self._send(DISPATCHER, m.Returned(id, "moved"))

    def _enter(self, task: PrefillTask) -> None:
        """A prompt has come, and waits for pages."""
        if self.store is not None and self.store.ahead is not None:
            self.store.ahead.asked(task.sequence)
        self.queue.add(task)

    def _hear(self, store: StoreClient, message: m.FromStore) -> None:
        match message:
            case m.Looked():
                computing = self._computing()
                queue = sum(task.remaining for task in (*self.queue.tasks, *self.chunks.active))
                store.looked(message, computing, queue)
            case m.Loaded():
                store.loaded(message)
            case m.Stored():
                store.behind.stored(message)
        added, removed = store.behind.changes()
        if added or removed:
            self._send(DISPATCHER, m.StoreChanged(added, removed))

    def _store_plan(self, now: float) -> tuple[StorePlan | None, bool]:
        """What is to be done with the store, and whether somebody waits for it."""
        if self.store is None:
            return None, False
        self.store.expire(now)
        urgent = self.store.urgent
        # Before pages are given away: what is to be written is copied before it is overwritten.
        busy = bool(self.queue.tasks or self.chunks.active or self.borrowing.waits)
        return self.store.work(saves=not urgent, busy=busy), urgent

    def _with_looks(self, plan: StorePlan | None) -> StorePlan | None:
        """A plan for the store that asks, too, for prompts that have just got pages."""
        looks = self.store.take_looks() if self.store is not None else []
        if not looks:
            return plan
        plan = plan or StorePlan()
        return msgspec.structs.replace(plan, looks=[*plan.looks, *looks])

    def _computing(self) -> set[bytes]:
        """Chain keys of pages that are about to be computed."""
        page_size = self.cache.page_size
        return {
            key for t in self.chunks.active for key in t.sequence.chain[t.filled // page_size :]
        }

    def _publish(self) -> None:
        change = self.index_feed.change()
        if change is not None:
            self._send(DISPATCHER, change)

    def _abort(self, id: int, decode_worker: str) -> None:
        for tasks in (self.queue.tasks, self.chunks.active):
            for task in tasks:
                if task.sequence.id == id:
                    tasks.remove(task)
                    if task.node is not None:
                        task.node.extending = False
                    self.cache.release(task.pages)
                    self._send(DISPATCHER, m.Dropped(id))
                    return
        task = self.borrowing.abort(id) or (self.store.abort(id) if self.store else None)
        if task is not None:
            self.cache.release(task.pages)
            self._send(DISPATCHER, m.Dropped(id))
            return
        if self.held.is_untold(id):
            self._release(id)
            self._send(DISPATCHER, m.Dropped(id))
        # It has gone on, and whoever has it now will give its pages back.
        elif decode_worker:
            self._send(decode_worker, m.Abort(id))

    def _release(self, id: int) -> None:
        self.loans.repaid(id)
        task = self.held.release(id)
        if task is None:
            return
        if self.store is not None and not task.moved:
            self.store.behind.released(task)
        self.cache.release(task.pages)

    def _start_waiting(self) -> None:
        """Gives pages to waiting tasks; what the pool lacks of them others may lend, or the store
        may have."""
        store, borrowing = self.store, self.borrowing
        arriving = borrowing.arriving() | (store.arriving() if store is not None else set[bytes]())
        held = [*self.held.tasks(), *self._looked_for()]
        entered = self.queue.enter(self.chunks.active, held, arriving)
        lent = [*borrowing.take_ready(), *(task for task in entered if not borrowing.ask(task))]
        for task in lent:
            if store is None or not task.remaining or not store.ask(task):
                self._begin(task)
        for task in store.take_ready() if store is not None else ():
            self._begin(task)

    def _batch(self) -> list[PrefillTask]:
        """The prompts of the next call; empty where nothing can be computed now."""
        while True:
            self._start_waiting()
            batch = self.chunks.batch(self.queue.tasks)
            covered = self.chunks.take_covered()
            for task in covered:
                self._cover(task)
            # One that turned out to be covered lets in those that waited for its pages.
            if batch or not covered:
                return batch

    def _looked_for(self) -> list[PrefillTask]:
        """Prompts that have pages, and wait for those of other workers or of the store."""
        return [*self.borrowing.tasks(), *(self.store.tasks() if self.store is not None else ())]

    def _begin(self, task: PrefillTask) -> None:
        """What a prompt lacks, if anything, is computed, beginning with its next turn."""
        if not task.remaining:
            self._cover(task)
            return
        self.chunks.active.append(task)
        self._send(DISPATCHER, m.Pending(task.sequence.id, task.remaining))

    def _cover(self, task: PrefillTask) -> None:
        """All is there: it is held until the decode worker has it."""
        sequence, usage = task.sequence, task.usage()
        if not sequence.probe:
            self.stats.prefilled(sequence.model, usage, task.foreseen)
        self._send(DISPATCHER, m.Pending(sequence.id, 0))
        covered = m.Covered(sequence, usage)
        if not self.held.cover(task, covered, self.cache.page_size):
            self._send(sequence.decode_worker, covered)

    def _computed(self, task: PrefillTask, error: str | None) -> None:
        """The planned chunk of a task has been computed, or has failed."""
        end, task.planned = task.planned, None
        assert end is not None
        if task.node is not None:
            task.node.extending = False
        if error is not None:
            self._failed(task, error)
            return
        self.chunks.computed(task, end)
        if task.remaining == 0:
            self.chunks.active.remove(task)
            self._cover(task)
        else:
            self._send(DISPATCHER, m.Pending(task.sequence.id, task.remaining))

    def _failed(self, task: PrefillTask, error: str) -> None:
        """What the chunk would have written is not in the index; the task starts anew once."""
        self.chunks.active.remove(task)
        self.cache.release(task.pages)
        if task.tries + 1 < MAX_TRIES:
            self.queue.add(PrefillTask(task.sequence, tries=task.tries + 1))
        else:
            self._send(DISPATCHER, m.Failed(task.sequence.id, f"{self.name}: {error}"))

    def loads(self) -> dict[int, int]:
        """Prompt tokens still to be computed, by sequence."""
        tasks = (*self.queue.tasks, *self.chunks.active, *self._looked_for())
        return {task.sequence.id: task.remaining for task in tasks}

    def held_ids(self) -> set[int]:
        """Sequences that are known here, in any state, those that borrow pages among them."""
        waiting = (*self.queue.tasks, *self._looked_for())
        tasks = (*waiting, *self.chunks.active, *self.held.tasks())
        return {task.sequence.id for task in tasks} | self.loans.ids()
