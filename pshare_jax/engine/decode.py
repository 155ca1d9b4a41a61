"""A decode engine: one mesh, one pool, one thread, all models of the mesh.

Sequences of all models share the prompt pages of one pool; what a decode module writes goes to
pages that only its sequence has. LoRA modules of one base decode in one batch, full modules in a
batch each. A sequence that arrives with more than one token to read (a tail longer than 1, or a
replay after preemption) first extends its KV by those tokens with its own weights.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pshare_jax.cache.layout import PageLayout
from pshare_jax.cache.page_cache import PageCache
from pshare_jax.cache.pool import PagePool, Pages
from pshare_jax.config import DecodeConfig
from pshare_jax.engine.admission import Admission, Reservation
from pshare_jax.engine.buckets import TRANSFER_BUCKETS, bucket_for
from pshare_jax.engine.counters import Counters
from pshare_jax.engine.decode_inputs import DecodeInputs, DecodeRow
from pshare_jax.engine.handoff import Receiver, Staged
from pshare_jax.engine.host_arrays import host_array, padded
from pshare_jax.engine.request import MAX_LOGIT_BIAS, FinishReason, TokenLogprobs
from pshare_jax.engine.sampler import Sampled, empty_history, row_logprobs
from pshare_jax.engine.scheduler import (
    DECODE_WEIGHT,
    GroupTurns,
    next_batch,
    preemption_victim,
    steps_for,
)
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.steps import (
    DecodeInput,
    StepSpec,
    admit,
    decode_steps,
    replay_chunk,
)
from pshare_jax.engine.worker import Worker
from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.models.weights import Weights
from pshare_jax.sharding.rules import pool_sharding, replicated


@dataclass(frozen=True)
class GroupWeights:
    """What one group of models decodes with: weights, and stacked LoRA adapters if it has any."""

    weights: Weights
    adapters: Weights | PackedAdapters | None = None


@dataclass(eq=False)
class _Arrival:
    sequence: Sequence
    reservation: Reservation
    staged: list[Staged]


class DecodeEngine(Worker):
    """Generates tokens for sequences whose prompts were covered elsewhere.

    Args:
        index: number of this engine.
        mesh: its devices.
        groups: weights of each group of models, on `mesh`.
        spec: model and kernel backend.
        layout: page shape.
        num_pages: size of the pool.
        config: batch buckets and limits.
        max_model_len: most tokens of a sequence.
        counters: where work is counted.
        on_preempt: takes a preempted sequence back to prefill.
        on_room: called when pages or slots have become free.
        on_dead: called with the reason when the thread fails.
    """

    def __init__(
        self,
        index: int,
        mesh: Mesh,
        groups: Mapping[str, GroupWeights],
        spec: StepSpec,
        layout: PageLayout,
        num_pages: int,
        config: DecodeConfig,
        max_model_len: int,
        counters: Counters,
        on_preempt: Callable[[Sequence], None],
        on_room: Callable[[], None],
        on_dead: Callable[[str], None],
    ):
        super().__init__(f"decode{index}", on_dead, DECODE_WEIGHT)
        self.cache = PageCache(num_pages, layout.page_size)
        self._layout = layout
        self._groups = groups
        self._config = config
        self._max_len = max_model_len
        self._inputs = DecodeInputs(
            config.max_num_seqs, layout, max_model_len, spec, config.shared_prefix
        )
        self._counters = counters
        self._on_preempt = on_preempt
        self.admission = Admission(self.cache, layout, config.max_num_seqs, on_room)
        sharding, everywhere = pool_sharding(mesh, layout.num_kv_heads), replicated(mesh)
        self.staging: Sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        self._pool = PagePool(layout, num_pages, sharding)
        pages = self._pool.placement
        self._receiver = Receiver(pages, spec.backend)
        self._history = jax.jit(
            functools.partial(empty_history, config.max_num_seqs, max_model_len),
            out_shardings=everywhere,
        )()
        self._admit = jax.jit(admit, donate_argnums=0, out_shardings=everywhere)
        self._replay = jax.jit(
            functools.partial(replay_chunk, spec),
            donate_argnums=2,
            out_shardings=(pages, everywhere),
        )
        self._decode = jax.jit(
            functools.partial(decode_steps, spec, config.steps_per_dispatch),
            donate_argnums=(2, 3),
            out_shardings=(pages, everywhere, everywhere),
        )
        self._inbox: list[_Arrival] = []
        self._inbox_lock = threading.Lock()
        self._blocked: list[_Arrival] = []
        self._rows: list[DecodeRow] = []
        self._tick = 0
        self._group_turns = GroupTurns(config.group_quantum)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a slot; a snapshot, from any thread."""
        return [row.sequence for row in tuple(self._rows)]

    def commit(self, sequence: Sequence, reservation: Reservation, staged: list[Staged]) -> None:
        """Takes over a sequence and the pages its reservation lacked; from any thread."""
        with self._inbox_lock:
            self._inbox.append(_Arrival(sequence, reservation, staged))
        self.notify()

    def setup(self) -> None:
        """Claims the pool."""
        self._pool.own()

    def warm_up(self) -> None:
        """Compiles every step of every kind of group, on the padding page and the spare slot."""
        self._pool.own()
        self._write_history(self._config.max_num_seqs, [], {})
        kinds = {group.adapters is None: group for group in self._groups.values()}
        for group in kinds.values():
            for bucket in self._config.batch_buckets:
                for inputs in self._inputs.warm_up(bucket):
                    jax.block_until_ready(self._dispatch(group, inputs))
            for bucket in self._config.replay_buckets:
                jax.block_until_ready(self._extend(group, [], 0, [], bucket, -1))
        self._pool.disown()

    def warm_up_handoff(self, send: Callable[[int, Sharding], list[Staged]]) -> None:
        """Compiles the arrival of every number of pages; `send` makes them."""
        self._pool.own()
        for bucket in TRANSFER_BUCKETS:
            self._receiver.store(self._pool, send(bucket, self.staging))
        self._pool.disown()

    def work(self) -> bool:
        """Takes arrivals in, then gives one group of models a step."""
        arrived = self._receive()
        self._drop_abandoned()
        behind = [row for row in self._rows if row.num_behind > 1]
        if behind:
            self._catch_up(min(behind, key=lambda row: (row.last_step, row.order)))
        ready: dict[str, list[DecodeRow]] = {}
        for row in self._rows:
            if row.num_behind == 1:
                ready.setdefault(row.sequence.model.group, []).append(row)
        stepped = self._step_first(ready)
        return stepped or arrived or bool(behind)

    def _step_first(self, ready: Mapping[str, list[DecodeRow]]) -> bool:
        """Gives a step to the first group, in turn, that can get the pages for one."""
        for group in self._group_turns.order(ready):
            if self._step(group, next_batch(ready[group], max(self._config.batch_buckets))):
                self._group_turns.stepped(group, ready)
                return True
        return False

    def _receive(self) -> bool:
        """Stores arrived pages and admits the sequences whose pages are all there."""
        with self._inbox_lock:
            arrivals, self._inbox = self._inbox, []
        self._blocked += arrivals
        for arrival in arrivals:
            self._receiver.store(self._pool, arrival.staged)
            for node in arrival.reservation.arriving:
                node.ready = True
        for arrival in tuple(self._blocked):
            if all(node.ready for node in arrival.reservation.awaited):
                self._admit_row(arrival)
                self._blocked.remove(arrival)
        return len(arrivals) > 0

    def _admit_row(self, arrival: _Arrival) -> None:
        sequence, slot = arrival.sequence, arrival.reservation.slot
        tokens = sequence.known_tokens(0, sequence.num_tokens)
        self._write_history(slot, tokens, sequence.request.params.logit_bias)
        self._rows.append(DecodeRow(sequence, slot, arrival.reservation.pages, sequence.cover))

    def _write_history(self, slot: int, tokens: list[int], bias: Mapping[int, float]) -> None:
        row = np.zeros(self._max_len, np.int32)
        row[: len(tokens)] = tokens
        ids = np.full(MAX_LOGIT_BIAS, -1, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        self._history = self._admit(self._history, np.int32(slot), row, ids, values)

    def release_all(self) -> None:
        """Gives back what sequences hold here; once no engine thread runs any more."""
        for arrival in (*self._inbox, *self._blocked):
            self.cache.release(arrival.reservation.pages)
        for row in self._rows:
            self.cache.release(row.pages)
        self._inbox, self._blocked, self._rows = [], [], []

    def _drop_abandoned(self) -> None:
        for row in [row for row in self._rows if row.sequence.abandoned]:
            self._remove(row)
            row.sequence.finish(FinishReason.ABORT)

    def _remove(self, row: DecodeRow) -> None:
        self._rows.remove(row)
        self.admission.leave(row.slot, row.pages)

    def _catch_up(self, row: DecodeRow) -> None:
        """Writes one chunk of the KV that `row` lacks before it can sample."""
        bucket_limit = max(self._config.replay_buckets)
        end = min(row.num_kv + bucket_limit, row.sequence.num_tokens - 1)
        tokens = row.sequence.known_tokens(row.num_kv, end)
        bucket = bucket_for(len(tokens), self._config.replay_buckets)
        model = row.sequence.model
        group = self._groups[model.group]
        self._extend(group, row.pages, row.num_kv, tokens, bucket, model.adapter)
        row.num_kv = end
        self._tick += 1
        row.last_step = self._tick

    def _extend(
        self,
        group: GroupWeights,
        pages: list[int],
        start: int,
        tokens: list[int],
        bucket: int,
        adapter: int,
    ) -> jax.Array:
        ids = padded([tokens], (1, bucket))
        rows = self._inputs.rows([pages], [start], [len(tokens)], 1)
        index = host_array([adapter], np.int32)
        return self._pool.update(
            lambda pool: self._replay(group.weights, group.adapters, pool, ids, rows, index)
        )

    def _step(self, group: str, batch: list[DecodeRow]) -> bool:
        """One dispatch; False when no row of the batch could get the page it needs."""
        steps = steps_for(
            [row.sequence.remaining for row in batch], self._config.steps_per_dispatch
        )
        batch = [row for row in batch if row in self._rows and self._ensure_pages(row, steps)]
        # A row may have been preempted for the sake of one that came after it in the batch.
        batch = [row for row in batch if row in self._rows]
        if not batch:
            return False
        self._tick += 1
        bucket = bucket_for(len(batch), self._config.batch_buckets)
        inputs, reads = self._inputs.decode(group, batch, bucket, steps)
        self._counters.attended(self.name, reads.plain_pages, reads.saved_pages)
        sampled = self._dispatch(self._groups[group], inputs)
        wants_logprobs = any(row.sequence.request.params.logprobs is not None for row in batch)
        tokens = np.asarray(sampled.tokens)[:steps, : len(batch)].T.tolist()
        host = jax.device_get(sampled) if wants_logprobs else None
        for i, row in enumerate(batch):
            row.last_step = self._tick
            logprobs = (
                []
                if host is None
                else row_logprobs(host, i, steps, row.sequence.request.params.logprobs)
            )
            self._accept(row, tokens[i], logprobs)
        return True

    def _accept(self, row: DecodeRow, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        accepted, reason = row.sequence.accept(tokens)
        row.num_kv += len(accepted)
        self._counters.generated(row.sequence.model.name, len(accepted))
        if reason is not None:
            self._remove(row)
        row.sequence.emit(accepted, logprobs, reason)

    def _ensure_pages(self, row: DecodeRow, steps: int) -> bool:
        """Pages for the next `steps` tokens of `row`, preempting younger sequences if need be."""
        missing = self._layout.pages_for(row.num_kv + steps) - len(row.pages)
        while missing > 0:
            fresh = self.cache.allocate(missing)
            if fresh is not None:
                row.pages += fresh
                return True
            victim = preemption_victim(self._rows, row)
            if victim is None:
                return self._yield_to_older(row)
            self._preempt(victim)
        return True

    def _yield_to_older(self, row: DecodeRow) -> bool:
        """`row` is the youngest and there is no page: it gives way unless it is the only one.

        With sequences still arriving it waits for them instead: they are younger.
        """
        arriving = self.admission.num_inside > len(self._rows)
        if len(self._rows) > 1 and not arriving:
            self._preempt(row)
        return False

    def _preempt(self, row: DecodeRow) -> None:
        self._counters.preempted(row.sequence.model.name)
        self._remove(row)
        self._on_preempt(row.sequence)

    def _dispatch(self, group: GroupWeights, inputs: DecodeInput) -> Sampled:
        def step(pages: Pages) -> tuple[Pages, Sampled]:
            pages, self._history, sampled = self._decode(
                group.weights, group.adapters, pages, self._history, inputs
            )
            return pages, sampled

        return self._pool.update(step)
