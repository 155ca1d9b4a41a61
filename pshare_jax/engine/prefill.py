"""A prefill engine: one mesh, one pool, one thread. Covers prompts with KV and hands them over.

A turn of a task first takes what the prefix index holds (other tasks may have added to it since),
then computes one chunk. Chunks end at page boundaries but for a prompt's last one, so that between
turns every page is either complete or the end of some finished prompt. That end is extended in
place by a prompt that goes on from exactly there, and copied by one that branches off within it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pshare_jax.cache.layout import PageLayout
from pshare_jax.cache.page_cache import PageCache
from pshare_jax.cache.pool import PagePool, Pages
from pshare_jax.cache.prefix_index import Node
from pshare_jax.engine.buckets import bucket_for
from pshare_jax.engine.counters import Counters
from pshare_jax.engine.decode import DecodeEngine
from pshare_jax.engine.handoff import Sender
from pshare_jax.engine.host_arrays import host_array, padded
from pshare_jax.engine.request import FinishReason, PromptUsage
from pshare_jax.engine.scheduler import PREFILL_WEIGHT, next_prefill
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.steps import Rows, StepSpec, prefill_chunk
from pshare_jax.engine.worker import Worker
from pshare_jax.kernels.page_transfer.api import copy_pages
from pshare_jax.models.weights import Weights
from pshare_jax.sharding.rules import pool_sharding, replicated


@dataclass(eq=False)
class PrefillTask:
    """A sequence in this engine: its pages in order of position, and how far they are filled.

    `reused` counts the prompt tokens found in the index by the model that had them computed. `node`
    is the page this turn's chunk extends, `copied_origins` belong to the tokens of a copied page.
    """

    sequence: Sequence
    pages: list[int] = field(default_factory=list)
    node: Node | None = None
    copied_origins: list[str] = field(default_factory=list)
    filled: int = 0
    computed: int = 0
    reused: Counter[str] = field(default_factory=Counter)

    @property
    def order(self) -> int:
        """Arrival order."""
        return self.sequence.order

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be covered."""
        return self.sequence.cover - self.filled

    @property
    def pending(self) -> int:
        """Prompt tokens still to be computed, as far as is known."""
        return min(self.remaining, self.sequence.num_uncached)

    def usage(self) -> PromptUsage:
        """Where this prompt's KV came from."""
        own = self.reused[self.sequence.model.name]
        cached = self.reused.total()
        return PromptUsage(
            prompt_tokens=len(self.sequence.prompt),
            computed_tokens=self.computed,
            cached_tokens=cached,
            shared_tokens=cached - own,
        )


class PrefillEngine(Worker):
    """Covers prompts in its pool and hands the pages to decode engines.

    Args:
        index: number of this engine.
        mesh: its devices.
        weights: weights by name (the base's, and those of isolated models), on `mesh`.
        spec: model and kernel backend.
        layout: page shape.
        num_pages: size of the pool.
        chunk_buckets: compiled chunk lengths, in tokens; the largest holds at least one page.
        max_model_len: most tokens of a sequence.
        decoders: the decode engines.
        counters: where work is counted.
        on_dead: called with the reason when the thread fails.
    """

    def __init__(
        self,
        index: int,
        mesh: Mesh,
        weights: Mapping[str, Weights],
        spec: StepSpec,
        layout: PageLayout,
        num_pages: int,
        chunk_buckets: list[int],
        max_model_len: int,
        decoders: list[DecodeEngine],
        counters: Counters,
        on_dead: Callable[[str], None],
    ):
        super().__init__(f"prefill{index}", on_dead, weight=PREFILL_WEIGHT)
        self.cache = PageCache(num_pages, layout.page_size)
        self._layout = layout
        self._weights = weights
        self._buckets = sorted(chunk_buckets)
        self._table_width = layout.pages_for(max_model_len)
        self._decoders = decoders
        self._counters = counters
        sharding = pool_sharding(mesh, layout.num_kv_heads)
        self._pool = PagePool(layout, num_pages, sharding)
        pages = self._pool.placement
        self._chunk = jax.jit(
            functools.partial(prefill_chunk, spec),
            donate_argnums=1,
            out_shardings=(pages, replicated(mesh)),
        )
        self._copy = jax.jit(
            functools.partial(copy_pages, backend=spec.backend),
            donate_argnums=0,
            out_shardings=pages,
        )
        staging = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        self._sender = Sender(staging, spec.backend)
        self._inbox: list[Sequence] = []
        self._inbox_lock = threading.Lock()
        self._waiting: list[PrefillTask] = []
        self._active: list[PrefillTask] = []
        self._covered: list[PrefillTask] = []
        self._turn = 0

    @property
    def num_pending_tokens(self) -> int:
        """Prompt tokens still to be computed here; read by the router, from any thread."""
        with self._inbox_lock:
            queued = sum(sequence.num_uncached for sequence in self._inbox)
        return queued + sum(task.pending for task in (*self._waiting, *self._active))

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence over; from any thread."""
        with self._inbox_lock:
            self._inbox.append(sequence)
        self.notify()

    def setup(self) -> None:
        """Claims the pool."""
        self._pool.own()

    def warm_up(self) -> None:
        """Compiles everything this engine runs, its handoffs included, on the padding page."""
        self._pool.own()
        for bucket in self._buckets:
            marker = self._run_chunk(next(iter(self._weights.values())), [], 0, [0] * bucket, 0)
            jax.block_until_ready(marker)
        self._copy_page(0, 0)
        for decoder in self._decoders:
            decoder.warm_up_handoff(
                lambda count, sharding: self._sender.move(
                    self._pool, [0] * count, [0] * count, sharding
                )
            )
        self._pool.disown()

    def work(self) -> bool:
        """Admits, computes one chunk of one task, and hands over what is covered."""
        self._admit()
        self._drop_abandoned()
        self._start_waiting()
        computed = len(self._active) > 0
        if computed:
            task = next_prefill(self._active, self._turn)
            self._turn += 1
            self._advance(task)
            if task.remaining == 0:
                self._active.remove(task)
                self._cover(task)
        return self._hand_over() or computed

    def _admit(self) -> None:
        with self._inbox_lock:
            self._waiting += [PrefillTask(sequence) for sequence in self._inbox]
            self._inbox.clear()
        self._waiting.sort(key=lambda task: task.order)

    def _drop_abandoned(self) -> None:
        for tasks in (self._waiting, self._active, self._covered):
            for task in [task for task in tasks if task.sequence.abandoned]:
                tasks.remove(task)
                self.cache.release(task.pages)
                task.sequence.finish(FinishReason.ABORT)

    def release_all(self) -> None:
        """Gives back what sequences hold here; once no engine thread runs any more."""
        for tasks in (self._waiting, self._active, self._covered):
            for task in tasks:
                self.cache.release(task.pages)
            tasks.clear()

    def _start_waiting(self) -> None:
        """Gives pages to waiting tasks, oldest first, as long as there are enough.

        A task whose next page is about to be computed for another one waits for that, rather than
        take pages that it will not need.
        """
        coming = {key for task in self._active for key in self._uncomputed(task)}
        for task in tuple(self._waiting):
            sequence = task.sequence
            if not coming.isdisjoint(sequence.chain):
                continue
            matched = self.cache.match(sequence.keys, sequence.prompt)
            fresh = self.cache.allocate(self._layout.pages_for(sequence.cover) - len(matched))
            if fresh is None:
                self.cache.release(node.page for node in matched)
                return
            self._waiting.remove(task)
            task.pages = [node.page for node in matched] + fresh
            for node in matched:
                self._account(task, node, len(node.tokens))
            if task.remaining:
                self._active.append(task)
                coming.update(self._uncomputed(task))
            else:
                self._cover(task)

    def _uncomputed(self, task: PrefillTask) -> list[bytes]:
        return task.sequence.chain[task.filled // self._layout.page_size :]

    def _cover(self, task: PrefillTask) -> None:
        self._covered.append(task)
        self._counters.prefilled(task.sequence.model.name, task.usage())

    def _advance(self, task: PrefillTask) -> None:
        self._reuse(task)
        if task.remaining == 0:
            return
        sequence, page_size = task.sequence, self._layout.page_size
        end = task.filled + self._buckets[-1]
        end = sequence.cover if end >= sequence.cover else end - end % page_size
        tokens = sequence.prompt[task.filled : end]
        weights = self._weights[sequence.model.prefill_weights]
        marker = self._run_chunk(weights, task.pages, task.filled, tokens, len(tokens))
        self._index(task, end)
        task.computed += len(tokens)
        task.filled = end
        jax.block_until_ready(marker)

    def _reuse(self, task: PrefillTask) -> None:
        """Moves `task.filled` on over everything the index holds."""
        sequence, page_size = task.sequence, self._layout.page_size
        task.node, task.copied_origins = None, []
        while task.remaining:
            number = task.filled // page_size
            block = sequence.cover_block(number)
            if number < len(sequence.keys):
                key = sequence.keys[number : number + 1]
                if found := self.cache.match(key, block):
                    self._replace_page(task, number, found[0].page)
                    self._account(task, found[0], page_size)
                    continue
            self._reuse_part(task, number, block)
            return

    def _reuse_part(self, task: PrefillTask, number: int, block: list[int]) -> None:
        """Uses the page that starts with most of `block`: as it is, extended, or copied."""
        child = self.cache.best_child(task.sequence.parent_key(number), block)
        if child is None or child[1] == 0:
            return
        node, length = child
        whole = length == len(block)
        extend = node.key is None and length == len(node.tokens)
        if whole or extend:
            self.cache.retain(node)
            self._replace_page(task, number, node.page)
            task.node = None if whole else node
        else:
            self._copy_page(node.page, task.pages[number])
            task.copied_origins = node.origins[:length]
        self._account(task, node, length)

    def _replace_page(self, task: PrefillTask, number: int, page: int) -> None:
        self.cache.release([task.pages[number]])
        task.pages[number] = page

    def _account(self, task: PrefillTask, node: Node, length: int) -> None:
        task.reused.update(node.origins[:length])
        task.filled += length

    def _index(self, task: PrefillTask, end: int) -> None:
        """Enters the pages that hold positions task.filled .. end-1 into the index."""
        sequence, page_size = task.sequence, self._layout.page_size
        first = task.filled // page_size
        parent = self.cache.node_of(task.pages[first - 1]) if first else None
        for number in range(first, self._layout.pages_for(end)):
            tokens = sequence.prompt[number * page_size : min((number + 1) * page_size, end)]
            key = sequence.keys[number] if len(tokens) == page_size else None
            node = task.node if number == first else None
            if node is None:
                copied = task.copied_origins if number == first else []
                node = Node(
                    parent=parent,
                    parent_key=sequence.parent_key(number),
                    page=task.pages[number],
                    tokens=tokens,
                    origins=[*copied, *[sequence.model.name] * (len(tokens) - len(copied))],
                    key=key,
                )
                self.cache.insert(node)
            else:
                origins = [sequence.model.name] * (len(tokens) - len(node.tokens))
                self.cache.extend(node, tokens, origins, key)
            parent = node

    def _hand_over(self) -> bool:
        """Hands covered prompts, oldest first, to decode engines as far as those have room."""
        handed, full = False, set()
        for task in sorted(self._covered, key=lambda task: task.order):
            sequence = task.sequence
            decoder = self._decoders[sequence.decode_engine]
            reservation = None if decoder in full else decoder.admission.reserve(sequence)
            if reservation is None:
                full.add(decoder)
                continue
            source = [task.pages[number] for number in reservation.fill]
            target = [reservation.pages[number] for number in reservation.fill]
            try:
                staged = self._sender.move(self._pool, source, target, decoder.staging)
            except BaseException:
                decoder.admission.leave(reservation.slot, reservation.pages)
                raise
            num_bytes = len(source) * self._layout.bytes_per_page
            self._counters.handed_over(sequence.model.name, len(source), num_bytes)
            if sequence.usage is None:
                sequence.usage = dataclasses.replace(task.usage(), handoff_bytes=num_bytes)
            self._covered.remove(task)
            self.cache.release(task.pages)
            decoder.commit(sequence, reservation, staged)
            handed = True
        return handed

    def _run_chunk(
        self, weights: Weights, pages: list[int], start: int, tokens: list[int], length: int
    ) -> jax.Array:
        bucket = bucket_for(len(tokens), self._buckets)
        ids = padded([tokens], (1, bucket))
        rows = Rows(
            padded([pages], (1, self._table_width)),
            host_array([start], np.int32),
            host_array([length], np.int32),
        )
        return self._pool.update(lambda pool: self._chunk(weights, pool, ids, rows))

    def _copy_page(self, source: int, target: int) -> None:
        src, dst = np.asarray([source], np.int32), np.asarray([target], np.int32)

        def copy(pages: Pages) -> tuple[Pages, None]:
            return self._copy(pages, src, dst), None

        self._pool.update(copy)
