"""The prefill core: covers prompts with KV and holds the pages until they have been fetched.

A turn of a task first takes what the prefix index holds (other tasks may have added to it since),
then plans one chunk. Chunks end at page boundaries but for a prompt's last one, so that between
turns every page is either complete or the end of some finished prompt. That end is extended in
place by a prompt that goes on from exactly there, and copied by one that branches off within it.

Chunks of several prompts are computed in one call: see `chunk_shapes`. When there is nothing else
to do, replies are covered that the next prompts will begin with: see `reply_prefill`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Sequence_

import msgspec

from pshare_jax.core import messages as m
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.index_feed import IndexFeed
from pshare_jax.core.messages import DISPATCHER, Message, Outbox
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Chunk, Offer, PrefillPlan, PrefillResult, StorePlan
from pshare_jax.core.prefill_queue import PrefillQueue
from pshare_jax.core.prefill_task import MAX_ASKED, PrefillTask, PromptPages
from pshare_jax.core.reply_prefill import ReplyPrefill
from pshare_jax.core.scheduling import next_prefill
from pshare_jax.core.shares import FairClock, HasSequence, in_turn
from pshare_jax.core.stats import PrefillStats
from pshare_jax.core.store_client import StoreClient

STORE_SECONDS = 0.01
"""Between two looks at the deadlines of what was asked of the KV store."""

MAX_TRIES = 2
"""Calls in which a chunk may fail before its request does."""


def chunk_shapes(chunk_buckets: Sequence_[int]) -> list[tuple[int, int]]:
    """Rows and tokens a row of the compiled chunk calls.

    A call computes at most as many tokens as the largest bucket has: one row of each bucket's
    length, or several rows of a smaller one's, so that short prompts are computed together.
    """
    largest = max(chunk_buckets)
    shapes = {(1, bucket) for bucket in chunk_buckets}
    shapes |= {(largest // bucket, bucket) for bucket in chunk_buckets}
    return sorted(shapes)


class PrefillCore:
    """Covers prompts in the pages of one pool.

    Args:
        name: of the worker.
        cache: the pages; shared with a decode core where both use one pool.
        models: the served models by name.
        chunk_buckets: compiled chunk lengths, in tokens; the largest holds at least one page.
        pads: whether rows of a call are computed though nothing is in them.

    Attributes:
        outbox: messages to others; who carries them empties it.
        stats: what has been done.
        queue: tasks that wait for pages.
        index_feed: what routers are told of its index.
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
    ):
        self.name = name
        self.cache = cache
        self.outbox: Outbox = []
        self.stats = PrefillStats()
        self.queue = PrefillQueue(cache)
        self.index_feed = IndexFeed(cache)
        self.store: StoreClient | None = None
        self.rests = False
        self._clock = FairClock()
        self._pages = PromptPages(cache)
        self._models = dict(models)
        self._pads = pads
        self._buckets = sorted(chunk_buckets)
        self._budget = self._buckets[-1]
        self._active: list[PrefillTask] = []
        self._held: dict[int, PrefillTask] = {}
        self._offers: list[Offer] = []
        self._offer_of: dict[int, int] = {}
        self._withdrawn: list[int] = []
        self._turn = 0
        self._replies = ReplyPrefill(cache, self._models, self._buckets, self.stats)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for pages that are there."""
        return bool(self._offers) or (self.store is not None and self.store.urgent)

    @property
    def patience(self) -> float | None:
        """Seconds after which `schedule` should be called again though nothing was heard."""
        return STORE_SECONDS if self.store is not None and self.store.waits else None

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
            case m.Fetch():
                self._fetch(message)
            case m.Release(id):
                self._release(id)
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
        withdrawn, self._withdrawn = self._withdrawn, []
        if self._offers:
            offers, self._offers = self._offers, []
            return PrefillPlan(offers=offers, withdrawn=withdrawn)
        store, alone = self._store_plan(now)
        if store is not None and alone:
            return PrefillPlan(withdrawn=withdrawn, store=store)
        self._start_waiting()
        copies: list[tuple[int, int]] = []
        batch = self._batch(copies)
        self._publish()
        if not batch:
            return PrefillPlan(withdrawn=withdrawn, store=store) if withdrawn or store else None
        rows, bucket = self._shape(batch)
        chunks = [
            Chunk(
                task.sequence.id,
                task.pages,
                task.filled,
                task.sequence.prompt[task.filled : task.planned],
            )
            for task in batch
        ]
        weights = self._models[batch[0].sequence.model].prefill_weights
        return PrefillPlan(
            withdrawn=withdrawn,
            copies=copies,
            weights=weights,
            shape=(rows, bucket),
            chunks=chunks,
            store=store,
        )

    def schedule_ahead(self) -> PrefillPlan | None:
        """A chunk of a reply that nobody asks for yet; None while anybody waits for anything."""
        if self.queue.tasks or self._active or self._held or self._offers:
            return None
        if self.store is not None and self.store.waits:
            return None
        plan = self._replies.plan()
        self._publish()
        return plan

    def apply(self, plan: PrefillPlan, result: PrefillResult) -> None:
        """Takes in what came of a plan."""
        if self._replies.apply(plan, result):
            self._publish()
            return
        for offer in plan.offers:
            transfer = offer.transfer
            id = self._offer_of.get(transfer, -1)
            if transfer in result.offered:
                descriptors = result.offered[transfer]
                address = result.addresses.get(transfer, "")
                self._send(offer.target, m.Offered(transfer, descriptors, address, id))
            else:
                reason = result.not_offered.get(transfer, "the pages were not put on offer")
                self._send(offer.target, m.NotOffered(transfer, reason, id))
        if plan.store is not None and self.store is not None:
            self.store.landed(plan.store)
        planned = {chunk.id for chunk in plan.chunks}
        for task in tuple(self._active):
            if task.sequence.id in planned and task.planned is not None:
                self._computed(task, result.failed.get(task.sequence.id))
        self._publish()

    @property
    def holds_pages(self) -> bool:
        """Whether any sequence holds pages here."""
        return bool(self._active or self._held or (self.store and self.store.runs))

    def holders(self, inside: Collection[int]) -> list[HasSequence]:
        """Tasks that hold pages and can start anew, and runs that are fetched for tasks.

        Sequences `inside` the decode worker have their pages from there too, and keep them.
        """
        tasks = (*self._active, *self._held.values())
        runs = self.store.runs if self.store is not None else ()
        found = (
            task
            for task in tasks
            if task.pages and not task.moved and task.sequence.id not in inside
        )
        return [*found, *runs]

    def give_way(self, task: HasSequence) -> bool:
        """Takes the pages of one of `holders`, unless they are in use at this moment.

        What it has computed stays in the index as long as there is room.
        """
        if not isinstance(task, PrefillTask):
            return self.store is not None and self.store.give_way(task)
        if task.planned is not None or self._is_offered(task):
            return False
        if task in self._active:
            self._active.remove(task)
        else:
            del self._held[task.sequence.id]
            self._send(task.sequence.decode_worker, m.Withdrawn(task.sequence.id))
        self.cache.release(task.pages)
        self.queue.add(PrefillTask(task.sequence))
        return True

    def hold_moved(self, sequence: m.Sequence, moved: m.Moved, pages: list[int]) -> None:
        """Holds the KV of a row that leaves the mesh until it has been fetched.

        Args:
            sequence: of the row.
            moved: what it takes along.
            pages: of that, each with a reference.
        """
        sequence = msgspec.structs.replace(
            sequence, covered=moved.num_kv, keys=moved.keys[:-1], last_key=moved.keys[-1]
        )
        self._held[moved.id] = PrefillTask(sequence, pages, filled=moved.num_kv, moved=True)

    def release_all(self) -> None:
        """Gives all pages back, of sequences that nobody will end."""
        for task in (*self.queue.tasks, *self._active, *self._held.values()):
            self.cache.release(task.pages)
        if self.store is not None:
            self.store.release_all()
        self.queue.tasks.clear()
        self._active.clear()
        self._held.clear()
        self._offers.clear()
        self._replies.clear()
        self.outbox.clear()

    def _is_offered(self, task: PrefillTask) -> bool:
        return task.sequence.id in self._offer_of.values()

    def _send(self, to: str, message: Message) -> None:
        self.outbox.append((to, message))

    def _let_waiting_go(self) -> None:
        """Gives back prompts of which nothing has been computed here."""
        looked_for = self.store.ids() if self.store is not None else set()
        waiting = {task.sequence.id for task in self.queue.tasks}
        self.queue.tasks.clear()
        for task in tuple(self._active):
            if not task.computed and task.planned is None:
                self._active.remove(task)
                self.cache.release(task.pages)
                waiting.add(task.sequence.id)
        for id in looked_for:
            if self.store is not None and self.store.abort(id) is not None:
                waiting.add(id)
        for id in sorted(waiting):
            self._send(DISPATCHER, m.Returned(id, "moved"))

    def _enter(self, task: PrefillTask) -> None:
        """A prompt has come: what the pool does not hold of it is looked for in the store."""
        if self.store is None or not self.store.ask(task):
            self.queue.add(task)

    def _hear(self, store: StoreClient, message: m.FromStore) -> None:
        match message:
            case m.Looked():
                computing = {key for task in self._active for key in self._uncomputed(task)}
                queue = sum(task.remaining for task in (*self.queue.tasks, *self._active))
                task = store.looked(message, computing, queue, self.queue.reserve)
                if task is not None:
                    self.queue.add(task)
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
        for task in self.store.expired(now):
            self.queue.add(task)
        urgent = self.store.urgent
        # Before pages are given away: what is to be written is copied before it is overwritten.
        return self.store.work(saves=not urgent), urgent

    def _uncomputed(self, task: PrefillTask) -> list[bytes]:
        return task.sequence.chain[task.filled // self.cache.page_size :]

    def _publish(self) -> None:
        change = self.index_feed.change()
        if change is not None:
            self._send(DISPATCHER, change)

    def _abort(self, id: int, decode_worker: str) -> None:
        for tasks in (self.queue.tasks, self._active):
            for task in tasks:
                if task.sequence.id == id:
                    tasks.remove(task)
                    if task.node is not None:
                        task.node.extending = False
                    self.cache.release(task.pages)
                    self._send(DISPATCHER, m.Dropped(id))
                    return
        if self.store is not None and self.store.abort(id) is not None:
            self._send(DISPATCHER, m.Dropped(id))
            return
        # It has gone on, and whoever has it now will give its pages back.
        if decode_worker:
            self._send(decode_worker, m.Abort(id))

    def _fetch(self, fetch: m.Fetch) -> None:
        task = self._held.get(fetch.id)
        if task is None:
            reason = f"{self.name} does not hold sequence {fetch.id}"
            self._send(fetch.worker, m.NotOffered(fetch.transfer, reason, fetch.id))
            return
        chain = task.sequence.chain
        self._offer_of[fetch.transfer] = fetch.id
        self._offers.append(
            Offer(
                fetch.transfer,
                fetch.worker,
                [task.pages[number] for number in fetch.pages],
                [chain[number] for number in fetch.pages],
                fetch.reader,
            )
        )

    def _release(self, id: int) -> None:
        task = self._held.pop(id, None)
        if task is None:
            return
        self._offers = [o for o in self._offers if self._offer_of.get(o.transfer) != id]
        for transfer in [t for t, owner in self._offer_of.items() if owner == id]:
            del self._offer_of[transfer]
            self._withdrawn.append(transfer)
        if self.store is not None and not task.moved:
            self.store.behind.released(task)
        self.cache.release(task.pages)

    def _start_waiting(self) -> None:
        """Gives pages to waiting tasks."""
        arriving = self.store.arriving() if self.store is not None else ()
        for task in self.queue.enter(self._active, self._held.values(), arriving):
            if self._ask_again(task):
                continue
            if task.remaining:
                self._active.append(task)
                self._send(DISPATCHER, m.Pending(task.sequence.id, task.remaining))
            else:
                self._cover(task)

    def _ask_again(self, task: PrefillTask) -> bool:
        """Has what the store is known to have fetched, if it was evicted while a prompt waited."""
        sequence, number = task.sequence, task.filled // self.cache.page_size
        known = number < len(sequence.keys) and self.store is not None
        if not (known and self.store and self.store.behind.knows(sequence.keys[number])):
            return False
        if task.asked >= MAX_ASKED:
            return False
        again = PrefillTask(sequence, tries=task.tries, asked=task.asked + 1)
        asked = self.store.ask(again)
        if asked:
            self.cache.release(task.pages)
        return asked

    def _cover(self, task: PrefillTask) -> None:
        """All is there: it is held until the decode worker has it."""
        sequence, usage = task.sequence, task.usage()
        self._held[sequence.id] = task
        if not sequence.probe:
            self.stats.prefilled(sequence.model, usage, task.foreseen)
        self._send(DISPATCHER, m.Pending(sequence.id, 0))
        self._send(sequence.decode_worker, m.Covered(sequence, usage))

    def _batch(self, copies: list[tuple[int, int]]) -> list[PrefillTask]:
        """Tasks whose next chunks are computed in one call; each knows where its chunk ends.

        The first is the policy's choice. Others join while there is room in the program's rows, if
        their prompts then are covered and the same weights compute them.
        """
        first = self._first(copies)
        if first is None or first.planned is None:
            return []
        rows, bucket = self._widest(first.planned - first.filled)
        weights = self._models[first.sequence.model].prefill_weights
        others = [
            task
            for task in self._active
            if task is not first
            and task.remaining <= bucket
            and self._models[task.sequence.model].prefill_weights == weights
        ]
        # Rows that are computed though nothing is in them had better be few.
        if self._pads and 2 * (1 + len(others)) <= rows:
            return [first]
        others = in_turn(first.sequence, others)
        return [first, *(t for t in others[: rows - 1] if self._plan(t, bucket, copies))]

    def _first(self, copies: list[tuple[int, int]]) -> PrefillTask | None:
        """The task whose turn it is, its next chunk planned."""
        self._clock.update(task.sequence for task in (*self._active, *self.queue.tasks))
        while self._active:
            fair = self._clock.next(self._active)
            near = [t for t in self._active if not self._clock.is_ahead(t.sequence, self._budget)]
            task = next_prefill(near, self._turn, fair)
            self._turn += 1
            if self._plan(task, self._budget, copies):
                return task
        return None

    def _widest(self, length: int) -> tuple[int, int]:
        bucket = bucket_for(length, self._buckets)
        return self._budget // bucket, bucket

    def _shape(self, batch: list[PrefillTask]) -> tuple[int, int]:
        """Rows and tokens of the smallest program that holds the batch."""
        longest = max(t.planned - t.filled for t in batch if t.planned is not None)
        rows, bucket = self._widest(longest)
        return (1 if len(batch) == 1 else rows), bucket

    def _plan(self, task: PrefillTask, budget: int, copies: list[tuple[int, int]]) -> bool:
        """Decides where the next chunk of a task ends; False when the index holds all the rest."""
        self._pages.reuse(task, copies)
        if task.remaining == 0:
            self._active.remove(task)
            self._cover(task)
            return False
        covered, page_size = task.sequence.covered, self.cache.page_size
        end = task.filled + budget
        task.planned = covered if end >= covered else end - end % page_size
        return True

    def _computed(self, task: PrefillTask, error: str | None) -> None:
        """The planned chunk of a task has been computed, or has failed."""
        end, task.planned = task.planned, None
        assert end is not None
        if task.node is not None:
            task.node.extending = False
        if error is not None:
            self._failed(task, error)
            return
        self._pages.index(task, end)
        self._clock.worked(task.sequence, end - task.filled)
        task.computed += end - task.filled
        task.filled = end
        if task.remaining == 0:
            self._active.remove(task)
            self._cover(task)
        else:
            self._send(DISPATCHER, m.Pending(task.sequence.id, task.remaining))

    def _failed(self, task: PrefillTask, error: str) -> None:
        """What the chunk would have written is not in the index; the task starts anew once."""
        self._active.remove(task)
        self.cache.release(task.pages)
        if task.tries + 1 < MAX_TRIES:
            self.queue.add(PrefillTask(task.sequence, tries=task.tries + 1))
        else:
            self._send(DISPATCHER, m.Failed(task.sequence.id, f"{self.name}: {error}"))

    def loads(self) -> dict[int, int]:
        """Prompt tokens still to be computed, by sequence."""
        return {task.sequence.id: task.remaining for task in (*self.queue.tasks, *self._active)}

    def held_ids(self) -> set[int]:
        """Sequences whose pages are held here, in any state."""
        tasks = (*self.queue.tasks, *self._active, *self._held.values())
        looked_for = self.store.ids() if self.store is not None else set()
        return {task.sequence.id for task in tasks} | looked_for
