"""Which chunks of which prompts a prefill worker computes next, in one call.

Chunks end at page boundaries but for a prompt's last one, so that between turns every page is
either complete or the end of some finished prompt. That end is extended in place by a prompt that
goes on from exactly there, and copied by one that branches off within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequence_

from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Chunk
from pshare_jax.core.prefill_task import PrefillTask, PromptPages
from pshare_jax.core.scheduling import PrefillTurns
from pshare_jax.core.shares import FairClock, in_turn

_SHORT = 4
"""Prompts that are done with one so many-th of the largest chunk do not wait for others' turns."""


def chunk_shapes(chunk_buckets: Sequence_[int]) -> list[tuple[int, int]]:
    """Rows and tokens a row of the compiled chunk calls.

    A call computes at most as many tokens as the largest bucket has: one row of each bucket's
    length, or several rows of a smaller one's, so that short prompts are computed together.
    """
    largest = max(chunk_buckets)
    shapes = {(1, bucket) for bucket in chunk_buckets}
    shapes |= {(largest // bucket, bucket) for bucket in chunk_buckets}
    return sorted(shapes)


class ChunkPlanner:
    """Prompts that have pages and are being covered, and whose turn it is.

    Args:
        cache: the pages.
        models: the served models by name; they may change.
        chunk_buckets: compiled chunk lengths, in tokens; the largest holds at least one page.
        pads: whether rows of a call are computed though nothing is in them.

    Attributes:
        active: the prompts.
        covered: prompts of which the index turned out to hold all the rest; who plans empties it.
        copies: pages to be copied before the planned chunks are computed; who plans empties it.
    """

    def __init__(
        self,
        cache: PageCache,
        models: Mapping[str, ModelSpec],
        chunk_buckets: Sequence_[int],
        *,
        pads: bool,
    ):
        self.active: list[PrefillTask] = []
        self.covered: list[PrefillTask] = []
        self.copies: list[tuple[int, int]] = []
        self._page_size = cache.page_size
        self._pages = PromptPages(cache)
        self._models = models
        self._pads = pads
        self._buckets = sorted(chunk_buckets)
        self._budget = self._buckets[-1]
        self._clock = FairClock()
        self._turns = PrefillTurns()
        # What fits a call of four rows takes about a quarter of the largest chunk's time.
        self._short = max((b for b in self._buckets if _SHORT * b <= self._budget), default=0)

    def batch(self, waiting: Iterable[PrefillTask]) -> list[PrefillTask]:
        """Prompts whose next chunks are computed in one call; each knows where its chunk ends.

        The first is the policy's choice. Others join while there is room in the program's rows, if
        their prompts then are covered and the same weights compute them. A turn first takes what
        the prefix index holds: other prompts may have added to it since the last one.

        Args:
            waiting: prompts that have no pages yet, which have their shares, too.
        """
        first = self._first(waiting)
        if first is None or first.planned is None:
            return []
        rows, bucket = self._widest(first.planned - first.filled)
        weights = self.weights(first)
        others = [
            task
            for task in self.active
            if task is not first and task.remaining <= bucket and self.weights(task) == weights
        ]
        # Rows that are computed though nothing is in them had better be few.
        if self._pads and 2 * (1 + len(others)) <= rows:
            return [first]
        others = in_turn(first.sequence, others)
        return [first, *(task for task in others[: rows - 1] if self._plan(task, bucket))]

    def weights(self, task: PrefillTask) -> str:
        """Name of the weights that compute a prompt."""
        return self._models[task.sequence.model].prefill_weights

    def shape(self, batch: list[PrefillTask]) -> tuple[int, int]:
        """Rows and tokens of the smallest program that holds the batch."""
        longest = max(t.planned - t.filled for t in batch if t.planned is not None)
        rows, bucket = self._widest(longest)
        return (1 if len(batch) == 1 else rows), bucket

    def take_copies(self) -> list[tuple[int, int]]:
        """Pages to be copied, from and to, before the chunks of the last batch are computed."""
        copies, self.copies = self.copies, []
        return copies

    def take_covered(self) -> list[PrefillTask]:
        """Prompts that turned out to be covered when it was their turn."""
        covered, self.covered = self.covered, []
        return covered

    def computed(self, task: PrefillTask, end: int) -> None:
        """The chunk of a task up to `end` has been computed: others may find it."""
        self._pages.index(task, end)
        self._clock.worked(task.sequence, end - task.filled)
        task.computed += end - task.filled
        task.filled = end

    def _first(self, waiting: Iterable[PrefillTask]) -> PrefillTask | None:
        """The task whose turn it is, its next chunk planned."""
        self._clock.update(task.sequence for task in (*self.active, *waiting))
        ready = list(self.active)
        while ready:
            fair = self._clock.next(ready)
            near = [t for t in ready if not self._clock.is_ahead(t.sequence, self._budget)]
            task = self._turns.next(near, fair, self._short)
            if self._plan(task, self._budget):
                return task
            ready.remove(task)
        return None

    def _widest(self, length: int) -> tuple[int, int]:
        bucket = bucket_for(length, self._buckets)
        return self._budget // bucket, bucket

    def _plan(self, task: PrefillTask, budget: int) -> bool:
        """Decides where the next chunk of a task ends; False when it needs none now, since the
        index holds all the rest, or will soon hold what comes next."""
        self._pages.reuse(task, self.copies)
        if task.remaining == 0:
            self.active.remove(task)
            self.covered.append(task)
            return False
        covered, page_size = task.sequence.covered, self._page_size
        end = task.filled + budget
        end = self._pages.reach(task, covered if end >= covered else end - end % page_size)
        task.planned = end if end > task.filled else None
        return task.planned is not None


def chunks_of(batch: list[PrefillTask]) -> list[Chunk]:
    """The planned chunks."""
    return [
        Chunk(
            task.sequence.id,
            task.pages,
            task.filled,
            task.sequence.prompt[task.filled : task.planned],
        )
        for task in batch
    ]
