"""Executors: they carry out the plans of a core on a mesh. One thread owns an executor's pool."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pshare_jax.core.connector import Connector, TransferError, TransferState
from pshare_jax.core.messages import MAX_LOGIT_BIAS, PageDescriptor, TokenLogprobs
from pshare_jax.core.plans import (
    Admit,
    DecodePlan,
    DecodeResult,
    Landed,
    PrefillPlan,
    PrefillResult,
    Replay,
    Step,
)
from pshare_jax.core.shared_runs import SharedRuns
from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.models.weights import Weights
from pshare_jax.runtime.host_arrays import host_array, padded
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Call, Programs, Slot
from pshare_jax.runtime.sampler import Sampled, row_logprobs


@dataclass(frozen=True)
class GroupWeights:
    """What one group of models decodes with: weights, and stacked LoRA adapters if it has any."""

    weights: Weights
    adapters: Weights | PackedAdapters | None = None


class PrefillExecutor:
    """Carries out a prefill core's plans.

    Args:
        programs: of the mesh.
        pool: its pages.
        weights: by name (the base's, and those of isolated models), on the mesh.
        connector: the worker's end.
    """

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        weights: Mapping[str, Weights],
        connector: Connector,
    ):
        self.pool = pool
        self.programs = programs
        self._weights = weights
        self.connector = connector

    def warm_up(self, *, sends: bool) -> None:
        """Compiles what it runs, on the padding page; with `sends` what offers run too."""
        self.pool.own()
        calls = list(self.programs.prefill_calls())
        if sends:
            calls += self.programs.sending_calls()
        state = _State(self.programs, self.pool, next(iter(self._weights.values())))
        for call in calls:
            state.run(call)
        self.pool.disown()

    def own(self) -> None:
        """Makes the calling thread the owner of the pool."""
        self.pool.own()

    def run(self, plan: PrefillPlan) -> PrefillResult:
        """Carries out a plan; blocks until its chunks are computed."""
        for transfer in plan.withdrawn:
            self.connector.abort(transfer)
        offered: dict[int, list[PageDescriptor]] = {}
        refused: dict[int, str] = {}
        for offer in plan.offers:
            try:
                offered[offer.transfer] = self.connector.offer(offer)
            except TransferError as error:
                refused[offer.transfer] = str(error)
        for source, target in plan.copies:
            self._copy(source, target)
        if plan.chunks:
            jax.block_until_ready(self._chunk(plan))
        return PrefillResult(offered, refused)

    def _copy(self, source: int, target: int) -> None:
        src, dst = np.asarray([source], np.int32), np.asarray([target], np.int32)
        self.pool.update(lambda pages: (self.programs.copy(pages, src, dst), None))

    def _chunk(self, plan: PrefillPlan) -> jax.Array:
        batch, _ = plan.shape
        chunks = plan.chunks
        ids = padded([chunk.tokens for chunk in chunks], plan.shape)
        rows = self.programs.inputs.rows(
            [chunk.pages for chunk in chunks],
            [chunk.start for chunk in chunks],
            [len(chunk.tokens) for chunk in chunks],
            batch,
        )
        weights = self._weights[plan.weights]
        return self.pool.update(lambda pages: self.programs.chunk(weights, pages, ids, rows))


@dataclass(frozen=True)
class _Dispatched:
    """A step under way. `known` is what was known of its rows: slots may have others by its end."""

    plan: DecodePlan
    step: Step
    known: list[Admit]
    sampled: Sampled
    reads: SharedRuns


class DecodeExecutor:
    """Carries out a decode core's plans; the next one may be begun before the last is finished.

    Args:
        programs: of the mesh.
        pool: its pages.
        groups: weights of each group of models, on the mesh.
        connector: the worker's end.
    """

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        groups: Mapping[str, GroupWeights],
        connector: Connector,
    ):
        self.pool = pool
        self.programs = programs
        self._groups = dict(groups)
        self.connector = connector
        self._lock = threading.Lock()
        self._history = programs.history()
        self._slots: dict[int, Admit] = {}
        self._pulling: list[int] = []
        self._dispatched: deque[_Dispatched] = deque()

    def warm_up(self, *, receives: bool) -> None:
        """Compiles every step of every kind of group, on the padding page and the spare slot."""
        self.pool.own()
        kinds = {group.adapters is None: group for group in self._groups.values()}
        calls = list(self.programs.decode_calls())
        if receives:
            calls += self.programs.receiving_calls()
        for group in kinds.values():
            state = _State(self.programs, self.pool, group.weights, group.adapters, self._history)
            for call in calls:
                state.run(call)
            self._history = state.history
        self.pool.disown()

    def own(self) -> None:
        """Makes the calling thread the owner of the pool."""
        self.pool.own()

    def install(self, group: str, weights: GroupWeights) -> None:
        """Has the steps from now on decode `group` with `weights`; from any thread.

        Weights are only read, never donated: steps under way go on with what they were given.
        """
        with self._lock:
            self._groups = {**self._groups, group: weights}

    def forget(self, group: str) -> None:
        """Drops a group's weights, of which no model is left."""
        with self._lock:
            self._groups = {name: w for name, w in self._groups.items() if name != group}

    def weights(self, group: str) -> GroupWeights:
        """What a group decodes with."""
        return self._groups[group]

    @property
    def num_dispatched(self) -> int:
        """Steps that were begun and not finished."""
        return len(self._dispatched)

    def begin(self, plan: DecodePlan) -> list[Landed]:
        """Begins a plan; its step may still run when this returns.

        Returns:
            Transfers that have ended.
        """
        for transfer in plan.cancelled:
            self.connector.abort(transfer)
            if transfer in self._pulling:
                self._pulling.remove(transfer)
        landed = self._pull(plan)
        for admit in plan.admits:
            self._admit(admit)
        if plan.replay is not None:
            self._replay(plan.replay)
        if plan.step is not None:
            self._dispatched.append(self._step(plan, plan.step))
        return landed

    def finish(self) -> tuple[DecodePlan, DecodeResult]:
        """Waits for the oldest step that was begun, and reads its tokens."""
        done = self._dispatched.popleft()
        tokens = np.asarray(done.sampled.tokens)[: done.step.count, : len(done.step.rows)]
        return done.plan, DecodeResult(
            done.plan.number,
            tokens.T.tolist(),
            _logprobs(done),
            done.reads.plain_pages,
            done.reads.saved_pages,
        )

    def _pull(self, plan: DecodePlan) -> list[Landed]:
        landed: list[Landed] = []
        for pull in plan.pulls:
            try:
                self.connector.accept(pull)
                self._pulling.append(pull.transfer)
            except TransferError as error:
                landed.append(Landed(pull.transfer, str(error)))
        for transfer in tuple(self._pulling):
            try:
                if self.connector.poll(transfer) is TransferState.ARRIVING:
                    continue
                self.connector.commit(transfer)
                landed.append(Landed(transfer))
            except TransferError as error:
                landed.append(Landed(transfer, str(error)))
            self._pulling.remove(transfer)
        return landed

    def _admit(self, admit: Admit) -> None:
        self._slots[admit.slot] = admit
        row = np.zeros(self.programs.max_model_len, np.int32)
        row[: len(admit.tokens)] = admit.tokens
        bias = admit.params.logit_bias
        ids = np.full(MAX_LOGIT_BIAS, -1, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        self._history = self.programs.admit(self._history, np.int32(admit.slot), row, ids, values)

    def _replay(self, replay: Replay) -> None:
        group = self._groups[replay.group]
        ids = padded([replay.tokens], (1, replay.bucket))
        rows = self.programs.inputs.rows([replay.pages], [replay.start], [len(replay.tokens)], 1)
        index = host_array([replay.adapter], np.int32)
        self.pool.update(
            lambda pages: self.programs.replay(
                group.weights, group.adapters, pages, ids, rows, index
            )
        )

    def _step(self, plan: DecodePlan, step: Step) -> _Dispatched:
        inputs, reads = self.programs.inputs.decode(step, self._slots)
        group = self._groups[step.group]

        def run(pages: Pages) -> tuple[Pages, Sampled]:
            pages, self._history, sampled = self.programs.decode(
                group.weights, group.adapters, pages, self._history, inputs
            )
            return pages, sampled

        known = [self._slots[row.slot] for row in step.rows]
        return _Dispatched(plan, step, known, self.pool.update(run), reads)


def _logprobs(done: _Dispatched) -> list[list[TokenLogprobs]]:
    counts = [admit.params.logprobs for admit in done.known]
    if all(count is None for count in counts):
        return []
    host = jax.device_get(done.sampled)
    return [row_logprobs(host, i, done.step.count, count) for i, count in enumerate(counts)]


class _State:
    """What lies on the devices while programs are compiled by running them."""

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        weights: Weights,
        adapters: Weights | PackedAdapters | None = None,
        history: Any = None,
    ):
        self.history = history
        self.programs = programs
        self._pool = pool
        self._weights = weights
        self._adapters = adapters

    def run(self, call: Call) -> None:
        """Runs a program once, so that it is compiled."""

        def update(pages: Pages) -> tuple[Pages, Any]:
            given = {
                Slot.WEIGHTS: self._weights,
                Slot.ADAPTERS: self._adapters,
                Slot.POOL: pages,
                Slot.HISTORY: self.history,
            }
            if any(argument is Slot.STAGED for argument in call.arguments):
                given[Slot.STAGED] = self._staged(call.size[0])
            arguments = [given[a] if isinstance(a, Slot) else a for a in call.arguments]
            results = call.function(*arguments)
            if len(call.results) == 1:
                results = (results,)
            for slot, result in zip(call.results, results, strict=True):
                if slot is Slot.HISTORY:
                    self.history = result
                elif slot is Slot.POOL:
                    pages = result
            return pages, results

        jax.block_until_ready(self._pool.update(update))

    def _staged(self, count: int) -> jax.Array:
        zeros = np.zeros(self.programs.staged_shape(count), self.programs.layout.dtype)
        return jax.device_put(zeros, self.programs.staging)
