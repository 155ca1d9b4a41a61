"""A prefill engine in virtual time: the policy of `pshare_jax.engine.prefill`, no tensors."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from pshare_jax.bench.plan.chains import ChainPool, Lease
from pshare_jax.bench.plan.clock import Clock, Processor, Thread, Work
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.decode import SimDecode
from pshare_jax.bench.plan.requests import SimRequest
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.scheduling import PREFILL_WEIGHT, next_prefill


@dataclass(eq=False)
class _Task:
    request: SimRequest
    lease: Lease
    filled: int

    @property
    def order(self) -> int:
        return self.request.order

    @property
    def remaining(self) -> int:
        return self.request.cover - self.filled

    @property
    def pending(self) -> int:
        return min(self.remaining, self.request.num_uncached)


class SimPrefill(Thread):
    """Covers prompts in its pool, a chunk at a time, and hands them over.

    Args:
        clock: the time.
        processor: what computes its chunks.
        costs: of its mesh.
        pool: its pages.
        chunk_buckets: compiled chunk lengths in tokens.
        decoders: all decode engines.

    Attributes:
        computed_tokens: prompt tokens that were computed here.
    """

    def __init__(
        self,
        clock: Clock,
        processor: Processor,
        costs: CostModel,
        pool: ChainPool,
        chunk_buckets: Sequence[int],
        decoders: Sequence[SimDecode],
    ):
        super().__init__(clock, processor, PREFILL_WEIGHT)
        self.pool = pool
        self.computed_tokens = 0
        self._costs = costs
        self._buckets = sorted(chunk_buckets)
        self._decoders = decoders
        self._waiting: list[SimRequest] = []
        self._active: list[_Task] = []
        self._covered: list[_Task] = []
        self._turn = 0

    @property
    def num_pending_tokens(self) -> int:
        """Prompt tokens still to be computed here."""
        queued = sum(request.num_uncached for request in self._waiting)
        return queued + sum(task.pending for task in self._active)

    def submit(self, request: SimRequest) -> None:
        """Takes a request over."""
        self._waiting.append(request)
        self._waiting.sort(key=lambda request: request.order)
        self.notify()

    def work(self) -> Work:
        """Admits, computes one chunk of one task, and hands over what is covered."""
        self._start_waiting()
        computed = len(self._active) > 0
        if computed:
            task = next_prefill(self._active, self._turn)
            self._turn += 1
            yield from self._advance(task)
        handed = yield from self._hand_over()
        return handed or computed

    def _start_waiting(self) -> None:
        """Gives pages to waiting requests, oldest first, but for those whose prompt is coming."""
        coming = {task.request.chain for task in self._active}
        for request in tuple(self._waiting):
            if request.chain in coming:
                continue
            pool, cover = self.pool, request.cover
            cached = min(pool.tokens(request.chain), cover)
            lease = pool.hold(request.chain, pool.pages_for(cached))
            # The engine takes a fresh page for a part of one, and gives it back when it finds that.
            fresh = pool.pages_for(cover) - cached // pool.page_size
            enough = pool.num_available >= fresh
            if not enough or not pool.allocate(lease, pool.pages_for(cover) - lease.pages):
                pool.release(lease)
                return
            self._waiting.remove(request)
            request.note_reused(pool.origins(request.chain, cached))
            task = _Task(request, lease, cached)
            if task.remaining:
                self._active.append(task)
                coming.add(request.chain)
            else:
                self._covered.append(task)

    def _advance(self, task: _Task) -> Work:
        request, page_size = task.request, self.pool.page_size
        end = task.filled + self._buckets[-1]
        end = request.cover if end >= request.cover else end - end % page_size
        tokens = end - task.filled
        yield self._costs.chunk(bucket_for(tokens, self._buckets), tokens, task.filled)
        self.pool.extend(task.lease, end, request.model)
        self.computed_tokens += tokens
        request.computed += tokens
        task.filled = end
        if task.remaining == 0:
            self._active.remove(task)
            self._covered.append(task)
        return True

    def _hand_over(self) -> Generator[float, None, bool]:
        """Hands covered prompts, oldest first, to decode engines as far as those have room."""
        handed, full = False, set()
        for task in sorted(self._covered, key=lambda task: task.order):
            request = task.request
            decoder = self._decoders[request.decode_engine]
            room = None if decoder in full else decoder.reserve(request)
            if room is None:
                full.add(decoder)
                continue
            if seconds := self._costs.send(room.moved):
                yield seconds
            self._covered.remove(task)
            self.pool.release(task.lease)
            decoder.commit(request, room)
            handed = True
        return handed
