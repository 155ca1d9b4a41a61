"""A prefill core's side of the KV store: what is looked for, fetched, and written behind.

A prompt that has got its pages is looked for first, unless the pool holds it. For the pages that
the store has, prices decide how many of them are fetched: nobody waits for a fetch that costs more
than computing. A run of pages that is fetched is in the index, arriving, and comes in pieces;
prompts that need one of its pages wait until it has landed or failed. What does not come in time,
or is not what was asked for, is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from pshare_jax.core import messages as m
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Commit, Load, Look, StorePlan
from pshare_jax.core.prefetch import Prefetch
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.prices import Prices
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.shares import HasSequence
from pshare_jax.core.stats import StoreStats
from pshare_jax.core.store_runs import PIECE_PAGES, Looking, Piece, Run, begin_run
from pshare_jax.core.write_behind import WriteBehind, page_keys

MAX_LOADS = 4
"""Pieces that are being fetched at once: so many lie in the host's memory."""

LEAST_SECONDS = 0.02
"""What an answer of the store is waited for at least."""

MAX_LATE = 4
"""Answers that may be overdue; while there are more nothing is looked for."""

SLACK = 4.0
"""A fetch may take so many times what it should, or as long as computing would."""


class StoreClient:
    """What a prefill core knows of the store.

    Args:
        cache: the core's pages.
        prices: what computing and fetching cost.
        transfer_ids: never used twice.

    Attributes:
        stats: what has been done.
        behind: what is written.
        prices: what computing and fetching cost.
        ahead: what is fetched before anybody asks, if anything is.
    """

    def __init__(self, cache: PageCache, prices: Prices, transfer_ids: Iterator[int]):
        self.stats = StoreStats()
        self.behind = WriteBehind(cache)
        self.prices = prices
        self.ahead: Prefetch | None = None
        self._cache = cache
        self._ids = transfer_ids
        self._looking: dict[int, Looking] = {}
        self._fetching: dict[int, PrefillTask] = {}
        self._ready: list[PrefillTask] = []
        self._runs: dict[int, Run] = {}
        self._run_of: dict[int, Run] = {}
        self._overdue: set[int] = set()
        self._looks: list[Look] = []
        self._queued: list[Load] = []
        self._early_loads: list[Load] = []
        self._num_loading = 0
        self._early: set[int] = set()
        self._commits: list[Commit] = []
        self._dropped: list[int] = []
        self._now = 0.0

    @property
    def urgent(self) -> bool:
        """Whether there is something to do that needs no computation and that others wait for."""
        can_load = self._queued and self._num_loading < MAX_LOADS
        return bool(self._looks or self._commits or self._dropped or can_load)

    @property
    def waits(self) -> bool:
        """Whether an answer is waited for, so that deadlines count."""
        return bool(self._looking or self._runs or self._ready)

    @property
    def runs(self) -> list[HasSequence]:
        """What holds pages: runs, each with the sequence that it is fetched for."""
        return list(self._runs.values())

    @property
    def holds_pages(self) -> bool:
        """Whether pages are held here, for runs or for prompts that wait for an answer."""
        return bool(self._runs or self._looking or self._ready)

    def ids(self) -> set[int]:
        """Sequences whose prompts are here."""
        return {task.sequence.id for task in self.tasks()}

    def tasks(self) -> list[PrefillTask]:
        """Prompts that are here; they hold pages."""
        return [*self.holders, *self._fetching.values()]

    @property
    def holders(self) -> list[PrefillTask]:
        """Prompts that hold pages here for which nothing is being fetched."""
        return [*(looking.task for looking in self._looking.values()), *self._ready]

    def arriving(self) -> set[bytes]:
        """Chain keys of the pages that are being fetched, and that prompts here will have."""
        keys = {key for piece in self._pieces() for key in piece.load.keys}
        page_size = self._cache.page_size
        for task in self.tasks():
            keys.update(task.sequence.chain[task.filled // page_size :])
        return keys

    def ask(self, task: PrefillTask) -> bool:
        """Looks for what the pool does not hold of a prompt; False where that is not worth it.

        The task, which has got its pages, is kept here until there is an answer and what is to be
        fetched has come.
        """
        sequence = task.sequence
        lacking = self.lacks(sequence)
        if lacking is None:
            return False
        first, keys = lacking
        seconds = self.prices.compute(first * self._cache.page_size, sequence.covered)
        self._looking[sequence.id] = Looking(task, first, seconds)
        self._looks.append(Look(sequence.id, keys))
        self.stats.looks += 1
        return True

    def take_looks(self) -> list[Look]:
        """What the store is to be asked."""
        looks, self._looks = self._looks, []
        return looks

    def take_ready(self) -> list[PrefillTask]:
        """Prompts for which nothing more is fetched: what they lack is computed."""
        ready, self._ready = self._ready, []
        return ready

    def lacks(self, sequence: Sequence) -> tuple[int, list[bytes]] | None:
        """The first page that the pool does not hold of a prompt, and the keys from there on.

        None where looking for them is not worth it.
        """
        page_size, prices = self._cache.page_size, self.prices
        if len(self._overdue) >= MAX_LATE:
            return None
        first = self._cache.matched_tokens(sequence.keys, sequence.prompt)
        block = sequence.prompt[first : min(first + page_size, sequence.covered)]
        part = self._cache.best_child(sequence.parent_key(first // page_size), block)
        seconds = prices.compute(first + (part[1] if part else 0), sequence.covered)
        if seconds <= min(prices.call.values()) + min(prices.page.values()):
            return None
        return first // page_size, page_keys(sequence, page_size)[first // page_size :]

    def looked(self, answer: m.Looked, computing: set[bytes], queue: int) -> None:
        """An answer has come: begins to fetch what had better be fetched.

        Args:
            answer: where the first pages are that the store has.
            computing: chain keys of pages that are about to be computed.
            queue: tokens of prompts that wait elsewhere to be covered before this one.
        """
        if self.ahead is not None and self.ahead.looked(answer):
            return
        looking = self._looking.pop(answer.id, None)
        if looking is None:
            self._overdue.discard(answer.id)
            return
        self._waited(looking)
        task, chain = looking.task, page_keys(looking.task.sequence, self._cache.page_size)
        self.behind.know(chain[looking.first : looking.first + len(answer.places)])
        matched = self._cache.match(task.sequence.keys, task.sequence.prompt)
        number = len(matched)
        places = answer.places[max(number - looking.first, 0) :]
        keys = chain[number : number + len(places)]
        queue += sum(other.remaining for other in self.tasks())
        # Pages that were on their way when it was asked, and that failed, were not looked for.
        fits = number >= looking.first and computing.isdisjoint(keys)
        count = self._count(task, number, places, queue) if fits else 0
        if not count:
            self._cache.release(node.page for node in matched)
            self.stats.declined += len(places)
            self._ready.append(task)
            return
        fresh = task.pages[number : number + count]
        self._cache.hold(fresh)
        self._fetching[answer.id] = task
        self._queued += self._begin(task.sequence, matched, fresh, places[:count])

    def begin_early(
        self, sequence: Sequence, matched: list[Node], fresh: list[int], places: list[int]
    ) -> tuple[int, list[Node]]:
        """Begins to fetch pages that nobody has asked for; the transfer, and their nodes.

        Args:
            sequence: a prompt that they are part of.
            matched: the pages before them, referenced.
            fresh: pages for at most one piece, allocated.
            places: where they are in the store.
        """
        (load,) = self._begin(sequence, matched, fresh, places, early=True)
        self._early_loads.append(load)
        return load.transfer, self._run_of[load.transfer].pieces[load.transfer].nodes

    def is_fetching(self, transfer: int) -> bool:
        """Whether a piece is on its way."""
        return transfer in self._run_of

    def loaded(self, answer: m.Loaded) -> None:
        """A piece lies in the host's memory, or could not be had."""
        run = self._run_of.get(answer.transfer)
        if answer.transfer in self._early:
            self._early.discard(answer.transfer)
        else:
            self._num_loading -= 1
        if run is None:
            # Nobody wants it any more, but it lies there.
            if answer.error is None:
                self._dropped.append(answer.transfer)
            return
        piece = run.pieces[answer.transfer]
        if answer.error is not None:
            self.behind.know_not(piece.load.keys)
            self._piece_failed(run, piece)
        else:
            piece.loaded = True
            self._commits.append(Commit(piece.transfer, [node.page for node in piece.nodes]))

    def landed(self, plan: StorePlan) -> None:
        """What a plan said has been done: its pieces are in the pool."""
        for commit in plan.commits:
            run = self._run_of.pop(commit.transfer, None)
            if run is None:
                continue
            piece = run.pieces.pop(commit.transfer)
            for node in piece.nodes:
                # One whose predecessor has failed is not in the index any more.
                if node.state is PageState.ARRIVING:
                    node.state, node.filler = PageState.READY, None
                    self.stats.fetched_tokens += 0 if run.early else len(node.tokens)
            if run.early and self.ahead is not None:
                self.ahead.landed(piece.nodes)
                self._cache.pin(run.pages, self._cache.now + run.sequence.ttl)
            if (task := self._fetching.get(run.sequence.id)) is not None:
                task.take_landed(self._cache)
            self._ended(run)

    def work(self, *, saves: bool, busy: bool) -> StorePlan | None:
        """What is to be done next, or None; with `saves` also what nobody waits for.

        `busy` says whether prompts are here that need turns of the processor.
        """
        room = MAX_LOADS - self._num_loading
        loads, self._queued = self._queued[:room], self._queued[room:]
        self._num_loading += len(loads)
        if saves:
            self._work_ahead(busy)
            loads += self._early_loads
            self._early.update(load.transfer for load in self._early_loads)
            self._early_loads = []
        plan = StorePlan(
            looks=self.take_looks(),
            loads=loads,
            commits=self._commits,
            dropped=self._dropped,
            saves=self.behind.next_saves(PIECE_PAGES) if saves else [],
            touched=self.behind.take_touched() if saves else [],
        )
        self._commits, self._dropped = [], []
        return plan if plan != StorePlan() else None

    def expire(self, now: float) -> None:
        """Prompts that have waited long enough for an answer; late runs end, too."""
        self._now = now
        for run in tuple(self._runs.values()):
            if run.since is None:
                run.since = now
            elif now >= run.since + run.seconds:
                self.stats.late += len(run.pieces)
                for piece in run.pieces.values():
                    # What is too slow to be had is not asked for again.
                    self.behind.know_not(piece.load.keys)
                self._cancel(run)
        for id, looking in tuple(self._looking.items()):
            if looking.since is None:
                looking.since = now
            elif now >= looking.since + max(looking.seconds, LEAST_SECONDS):
                del self._looking[id]
                self._overdue.add(id)
                self._waited(looking)
                self.stats.late += 1
                self._ready.append(looking.task)

    def abort(self, id: int) -> PrefillTask | None:
        """Takes out a prompt, with its pages. A run goes on: others may need what it brings."""
        looking = self._looking.pop(id, None)
        task = looking.task if looking is not None else self._fetching.pop(id, None)
        for one in self._ready:
            if one.sequence.id == id:
                task = one
        self._ready = [one for one in self._ready if one.sequence.id != id]
        return task

    def give_way(self, run: HasSequence) -> bool:
        """Ends one of `runs`; False when it has ended already."""
        if not isinstance(run, Run) or id(run) not in self._runs:
            return False
        self._cancel(run)
        return True

    def release_all(self) -> None:
        """Gives all pages back."""
        for run in tuple(self._runs.values()):
            self._cancel(run)
        for task in self.tasks():
            self._cache.release(task.pages)
        self._looking.clear()
        self._fetching.clear()
        self._ready.clear()
        if self.ahead is not None:
            self.ahead.clear()

    def _work_ahead(self, busy: bool) -> None:
        """Has pages fetched that nobody asks for, if nobody waits for any, or for any's writing.

        Not while there are prompts: what is fetched is written into the pool in turns of theirs,
        and may be what one of them computes.
        """
        asked = any(not run.early for run in self._runs.values())
        # Before its turn a prompt does not hold the last, partly filled page that it goes on from.
        waiting = self._looking or self._ready or asked
        if self.ahead is None or busy or waiting or self.behind.has_more:
            return
        look = self.ahead.work()
        if look is not None:
            self._looks.append(look)

    def _pieces(self) -> Iterator[Piece]:
        for run in self._runs.values():
            yield from run.pieces.values()

    def _count(self, task: PrefillTask, number: int, places: list[int], queue: int) -> int:
        sequence, page_size = task.sequence, self._cache.page_size
        ends = [min((number + i + 1) * page_size, sequence.covered) for i in range(len(places))]
        ahead = sum(self.prices.fetch(piece.load.places) for piece in self._pieces())
        return self.prices.pages_to_fetch(
            places,
            ends,
            number * page_size,
            sequence.covered,
            queue * self.prices.token,
            ahead,
        )

    def _begin(
        self,
        sequence: Sequence,
        matched: list[Node],
        fresh: list[int],
        places: list[int],
        *,
        early: bool = False,
    ) -> list[Load]:
        """Enters pages that will be fetched into the index; what to fetch, piece by piece."""
        page_size, number = self._cache.page_size, len(matched)
        end = min((number + len(fresh)) * page_size, sequence.covered)
        computing = self.prices.compute(number * page_size, end)
        seconds = max(computing, SLACK * self.prices.fetch(places), LEAST_SECONDS)
        run = begin_run(self._cache, sequence, matched, fresh, places, self._ids, seconds, early)
        self._run_of.update(dict.fromkeys(run.pieces, run))
        self._runs[id(run)] = run
        return [piece.load for piece in run.pieces.values()]

    def _piece_failed(self, run: Run, piece: Piece) -> None:
        """Takes a piece out of the index, with all that follows it."""
        del run.pieces[piece.transfer]
        self._run_of.pop(piece.transfer, None)
        # From the end: what follows leaves before what it follows.
        for node in reversed(piece.nodes):
            if node.state is PageState.ARRIVING:
                self._cache.forget(node)
        self._ended(run)

    def _cancel(self, run: Run) -> None:
        for piece in reversed(list(run.pieces.values())):
            transfer, unsent = piece.transfer, (self._queued, self._early_loads)
            if all(load.transfer != transfer for loads in unsent for load in loads):
                self._dropped.append(transfer)
            for loads in unsent:
                loads[:] = [load for load in loads if load.transfer != transfer]
            self._commits = [commit for commit in self._commits if commit.transfer != transfer]
            self._piece_failed(run, piece)

    def _ended(self, run: Run) -> None:
        if not run.pieces and self._runs.pop(id(run), None) is not None:
            if not run.early:
                self._waited(run)
            self._cache.release(run.pages)
            if not run.early and (task := self._fetching.pop(run.sequence.id, None)) is not None:
                self._ready.append(task)

    def _waited(self, what: Looking | Run) -> None:
        if what.since is not None:
            self.stats.stall_seconds += self._now - what.since
