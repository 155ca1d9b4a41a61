"""Prompts that wait for pages to be covered in, and who of them gets some."""

from __future__ import annotations

from collections.abc import Collection

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.shares import MAX_DEPTH, Holdings

_RESERVE = 8
"""The part of the pool, one in so many pages, that those leave free who hold pages already."""

_MAX_PASSING = 4
"""Sequences that are looked at, before each chunk, to go past one that waits for pages."""


class PrefillQueue:
    """Gives pages to waiting tasks by fair shares, and lets small ones past those that wait.

    Args:
        cache: the pages.

    Attributes:
        tasks: those that wait.
        reserve: pages that are left for running sequences where the pool is shared.
        before: only tasks that are older than this get any, if it is set.
        wanting: who is next, but has found too few pages, although its request holds none.
    """

    def __init__(self, cache: PageCache):
        self.tasks: list[PrefillTask] = []
        self.reserve = 0
        self.before: int | None = None
        self.wanting: Sequence | None = None
        self._cache = cache

    def add(self, task: PrefillTask) -> None:
        """A task that has no pages."""
        self.tasks.append(task)

    def favour(self) -> None:
        """Others have given way for the sake of `wanting`: it may take what there is."""
        for task in self.tasks:
            if task.sequence is self.wanting:
                task.favoured = True
        self.wanting = None

    def enter(
        self,
        active: Collection[PrefillTask],
        held: Collection[PrefillTask],
        arriving: Collection[bytes] = (),
    ) -> list[PrefillTask]:
        """Takes out tasks, with pages and with what the index holds of their prompts.

        A task whose next page is about to be computed for another one waits for that, rather than
        take pages that it will not need.

        Args:
            active: tasks that are being covered.
            held: others that hold pages: they are covered, or wait for the KV store.
            arriving: chain keys of pages that are on their way, which are waited for.
        """
        self.wanting = None
        started: list[PrefillTask] = []
        coming = {*arriving, *(key for task in active for key in self._uncomputed(task))}
        tasks = [task for task in self.tasks if self.before is None or task.order < self.before]
        ready: list[PrefillTask] = [
            task for task in tasks if coming.isdisjoint(task.sequence.chain)
        ]
        while ready:
            holdings = _holdings([*active, *held, *started])
            task = holdings.next(ready)
            if self._start(task, holdings) is None:
                if holdings.depth(task.sequence) < MAX_DEPTH and not task.favoured:
                    self.wanting = task.sequence
                started += self._pass(task, ready, holdings)
                break
            started.append(task)
            coming = set(self._uncomputed(task))
            ready = [t for t in ready if t is not task and coming.isdisjoint(t.sequence.chain)]
        return started

    def _pass(
        self, first: PrefillTask, ready: list[PrefillTask], holdings: Holdings
    ) -> list[PrefillTask]:
        """Small tasks do not wait until there are pages for `first`, which is large.

        Together they take no more pages than it needs, so that it does not wait for ever.
        """
        page_size = self._cache.page_size
        started: list[PrefillTask] = []
        coming: set[bytes] = set()
        small = [task for task in ready if task.sequence.num_uncached < first.sequence.covered]
        for _ in range(min(len(small), _MAX_PASSING)):
            left = -(-first.sequence.covered // page_size) - first.passed
            task = holdings.next(small)
            small.remove(task)
            needed = -(-task.sequence.num_uncached // page_size)
            if task is first or needed > left or not coming.isdisjoint(task.sequence.chain):
                continue
            taken = self._start(task, holdings, most=left)
            if taken is not None:
                first.passed += taken
                started.append(task)
                coming.update(self._uncomputed(task))
        return started

    def _start(self, task: PrefillTask, holdings: Holdings, most: int | None = None) -> int | None:
        """Gives a task its pages: how many that takes, or None when it is too many.

        Args:
            task: one that waits.
            holdings: what others hold.
            most: pages that it may take.
        """
        sequence, cache = task.sequence, self._cache
        available = cache.num_available
        matched = cache.match(sequence.keys, sequence.prompt, ready=True)
        needed = -(-sequence.covered // cache.page_size) - len(matched)
        # Cached pages that nobody holds are taken, too.
        takes = needed + available - cache.num_available
        spare = self._spare(task, holdings) if takes else 0
        enough = available - takes >= spare and (most is None or takes <= most)
        fresh = cache.allocate(needed) if enough else None
        if fresh is None:
            cache.release(node.page for node in matched)
            return None
        self.tasks.remove(task)
        task.pages = [node.page for node in matched] + fresh
        for node in matched:
            task.account(node, len(node.tokens))
        return takes

    def _spare(self, task: PrefillTask, holdings: Holdings) -> int:
        """Pages that a task leaves free: more, the more its client, model and request hold."""
        if task.favoured:
            return 0
        depth = holdings.depth(task.sequence)
        return max(self.reserve, self._cache.num_usable // _RESERVE * depth // MAX_DEPTH)

    def _uncomputed(self, task: PrefillTask) -> list[bytes]:
        if task.remaining == 0:
            return []
        return task.sequence.chain[task.filled // self._cache.page_size :]


def _holdings(tasks: Collection[PrefillTask]) -> Holdings:
    return Holdings((task.sequence, float(task.sequence.covered)) for task in tasks)
