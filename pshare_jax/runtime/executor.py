"""Executors: they carry out the plans of a core on a mesh. One thread owns an executor's pool."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from pshare_jax.core.connector import Connector
from pshare_jax.core.plans import (
    Admit,
    DecodePlan,
    DecodeResult,
    Landed,
    Offer,
    PrefillPlan,
    PrefillResult,
    Replay,
    Step,
)
from pshare_jax.core.requests import MAX_LOGIT_BIAS, TokenLogprobs
from pshare_jax.core.shared_runs import SharedRuns
from pshare_jax.core.store_end import StoreEnd
from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.models.weights import Weights
from pshare_jax.runtime.host_arrays import host_array, padded
from pshare_jax.runtime.masks import Masks, RowMask, only
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.pulls import Pulls, make_offers
from pshare_jax.runtime.sampler import Sampled, row_logprobs
from pshare_jax.runtime.steps import DecodeInput
from pshare_jax.runtime.warm_up import WarmUp


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

    Attributes:
        store: its end of the KV store, if there is one.
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
        self.weights = weights
        self.connector = connector
        self._pulls = Pulls(connector)
        self.store: StoreEnd | None = None

    def warm_up(self, *, sends: bool, receives: bool) -> None:
        """Compiles what it runs, on the padding page.

        Args:
            sends: also what copies pages out of the pool.
            receives: also what writes pages into the pool.
        """
        self.pool.own()
        calls = list(self.programs.prefill_calls())
        if sends:
            calls += self.programs.sending_calls()
        if receives:
            calls += self.programs.receiving_calls()
        state = WarmUp(self.programs, self.pool, next(iter(self.weights.values())))
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
        landed = self._pulls.run(plan.cancelled, plan.pulls)
        made = make_offers(self.connector, plan.offers)
        if plan.store is not None and self.store is not None:
            self.store.run(plan.store)
        for source, target in plan.copies:
            self._copy(source, target)
        if plan.chunks:
            self.compute(plan)
        return PrefillResult(
            made.offered, made.not_offered, addresses=made.addresses, landed=landed
        )

    def _copy(self, source: int, target: int) -> None:
        src, dst = np.asarray([source], np.int32), np.asarray([target], np.int32)
        self.pool.update(lambda pages: (self.programs.copy(pages, src, dst), None))

    def compute(self, plan: PrefillPlan) -> None:
        """Computes the chunks of a plan and waits for them; the caller owns the pool."""
        jax.block_until_ready(self._chunk(plan))

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
        weights = self.weights[plan.weights]
        return self.pool.update(lambda pages: self.programs.chunk(weights, pages, ids, rows))


class _Later(NamedTuple):
    """What a step has left to the choice of its tokens, by what weights if any, and its input."""

    weights: Weights | None
    inputs: DecodeInput
    left: jax.Array


@dataclass(eq=False)
class _Dispatched:
    """A step under way.

    `known` and `masks` are what was known of its rows: slots may have others by its end. `later`
    is what its tokens are chosen by, until they are; `tokens` are what it gave once that was read.
    """

    plan: DecodePlan
    step: Step
    known: list[Admit]
    masks: list[RowMask | None]
    reads: SharedRuns
    sampled: Sampled
    later: _Later | None
    tokens: list[list[int]] | None = None
    failed: dict[int, str] = field(default_factory=dict)


class DecodeExecutor:
    """Carries out a decode core's plans; the next one may be begun before the last is finished.

    Args:
        programs: of the mesh.
        pool: its pages.
        groups: weights of each group of models, on the mesh.
        connector: the worker's end.
        masks: makes the masks of sequences whose choice of tokens is restricted.
    """

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        groups: Mapping[str, GroupWeights],
        connector: Connector,
        masks: Masks,
    ):
        self.pool = pool
        self.programs = programs
        self._groups = dict(groups)
        self.connector = connector
        self._lock = threading.Lock()
        self._history = programs.history()
        self._slots: dict[int, Admit] = {}
        self._masks = masks
        self._masked: dict[int, RowMask] = {}
        self._pulls = Pulls(connector)
        self._dispatched: deque[_Dispatched] = deque()

    def warm_up(self, *, receives: bool, sends: bool = False) -> None:
        """Compiles every step of every kind of group, on the padding page and the spare slot.

        Args:
            receives: also what writes pages into the pool.
            sends: also what copies pages out of the pool.
        """
        self.pool.own()
        kinds = {group.adapters is None: group for group in self._groups.values()}
        calls = list(self.programs.decode_calls())
        if receives:
            calls += self.programs.receiving_calls()
        if sends:
            calls += self.programs.sending_calls()
        for group in kinds.values():
            state = WarmUp(self.programs, self.pool, group.weights, group.adapters, self._history)
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
    def groups(self) -> Mapping[str, GroupWeights]:
        """What all groups decode with."""
        return self._groups

    @property
    def history(self) -> Any:
        """What lies on the device of all sequences; given away by the next step."""
        return self._history

    @property
    def num_dispatched(self) -> int:
        """Steps that were begun and not finished."""
        return len(self._dispatched)

    def offer(self, offers: Sequence[Offer]) -> PrefillResult:
        """Puts pages on offer to prefill workers; waits for steps under way."""
        return make_offers(self.connector, offers)

    def begin(self, plan: DecodePlan) -> list[Landed]:
        """Begins a plan; its step may still run when this returns.

        Returns:
            Transfers that have ended.
        """
        for earlier in tuple(self._dispatched):
            # Its tokens are fed to the next one, and its slots may get others.
            self._choose(earlier)
        landed = self._pulls.run(plan.cancelled, plan.pulls)
        for admit in plan.admits:
            self._admit(admit)
        if plan.replay is not None:
            self._replay(plan.replay)
        if plan.step is not None:
            self._dispatched.append(self._step(plan, plan.step))
            self._choose(self._dispatched[0])
        return landed

    def finish(self) -> tuple[DecodePlan, DecodeResult]:
        """Waits for the oldest step that was begun, and reads its tokens."""
        done = self._dispatched[0]
        tokens = self._read(done)
        self._dispatched.popleft()
        if self._dispatched:
            # Masks are made here, while the device computes the logits.
            self._choose(self._dispatched[0])
        return done.plan, DecodeResult(
            done.plan.number,
            tokens,
            _logprobs(done),
            done.reads.plain_pages,
            done.reads.saved_pages,
            done.failed,
        )

    def _admit(self, admit: Admit) -> None:
        self._slots[admit.slot] = admit
        self._masked.pop(admit.slot, None)
        if (mask := self._masks.admit(admit)) is not None:
            self._masked[admit.slot] = mask
        self._write(admit, admit.tokens)

    def _write(self, admit: Admit, tokens: Sequence[int]) -> None:
        """Tells the device the known tokens of a sequence."""
        row = np.zeros(self.programs.max_model_len, np.int32)
        row[: len(tokens)] = tokens
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
        masks = [self._masked.get(row.slot) for row in step.rows]
        deferred = any(mask is not None and mask.active for mask in masks)
        given = self.programs.inputs.deferred(inputs) if deferred else inputs

        def run(pages: Pages) -> tuple[Pages, tuple[Sampled, jax.Array]]:
            pages, self._history, *results = self.programs.decode(
                group.weights, group.adapters, pages, self._history, given
            )
            return pages, tuple(results)

        sampled, left = self.pool.update(run)
        known = [self._slots[row.slot] for row in step.rows]
        later = _Later(self.programs.head_of(group.weights), inputs, left) if deferred else None
        return _Dispatched(plan, step, known, masks, reads, sampled, later)

    def _choose(self, step: _Dispatched) -> None:
        """Has the tokens of a step chosen, if that was left for when masks are known."""
        if step.later is None:
            return
        for earlier in self._dispatched:
            if earlier is step:
                break
            self._read(earlier)
        mask = self._masks.fill(step.masks, step.step.bucket)
        for row, state in enumerate(step.masks):
            if state is not None and (told := _told(step, row, state)) is not None:
                mask[row] = only(self.programs.spec.config.vocab_size, told)
        weights, inputs, left = step.later
        choice = self.programs.inputs.choice(inputs, mask)
        self._history, step.sampled = self.programs.choose(weights, self._history, left, choice)
        step.later = None

    def _read(self, step: _Dispatched) -> list[list[int]]:
        """Waits for the tokens of a step, and takes them into the masks of its rows."""
        if step.tokens is None:
            self._choose(step)
            array = np.asarray(step.sampled.tokens)[: step.step.count, : len(step.step.rows)]
            tokens: list[list[int]] = array.T.tolist()
            for row, mask in enumerate(step.masks):
                if mask is not None:
                    overtaken = _told(step, row, mask) is not None
                    tokens[row] = [] if overtaken else self._follow(step, row, mask, tokens[row])
            step.tokens = tokens
        return step.tokens

    def _follow(self, step: _Dispatched, row: int, mask: RowMask, tokens: list[int]) -> list[int]:
        """Takes the tokens of a row in; gives them with those that must follow, if it is worth it.

        These need no steps. One that is under way already will be overtaken.
        """
        for token_id in tokens:
            mask.accept(token_id)
        if mask.error is not None:
            step.failed[row] = mask.error
            return tokens
        forced = mask.jump
        if forced:
            for token_id in forced:
                mask.accept(token_id)
            admit = step.known[row]
            # The row may have gone while its step ran, and its slot be another sequence's.
            if self._slots.get(admit.slot) is admit:
                self._write(admit, mask.tokens)
        return [*tokens, *forced]


def _told(step: _Dispatched, row: int, mask: RowMask) -> int | None:
    """The token that a row would get from a step, if it was told with an earlier one already."""
    position = step.step.rows[row].start + 1
    return mask.tokens[position] if position < len(mask.tokens) else None


def _logprobs(done: _Dispatched) -> list[list[TokenLogprobs]]:
    counts = [admit.params.logprobs for admit in done.known]
    if all(count is None for count in counts):
        return []
    host = jax.device_get(done.sampled)
    return [row_logprobs(host, i, done.step.count, count) for i, count in enumerate(counts)]
