"""The device functions of the engine: what one prefill chunk, one replay chunk and one decode
dispatch compute. Pure; weights and pages are arguments, so that one executable of a shape serves
every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from pshare_jax.models.blocks.experts import ExpertsBackend
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import Decoder, bind
from pshare_jax.models.lora import Adapters
from pshare_jax.models.packed import PackedDecoder, is_packed
from pshare_jax.models.weights import Weights
from pshare_jax.runtime.pool import Pages
from pshare_jax.runtime.sampler import (
    History,
    Sampled,
    SamplingRows,
    needs_logits,
    no_samples,
    sample,
)


class Rows(NamedTuple):
    """Where the tokens of a batch live; int32.

    `page_table [B, N]`, `start [B]` (position of the first token), `lens [B]` (valid tokens).
    """

    page_table: jax.Array
    start: jax.Array
    lens: jax.Array


class Runs(NamedTuple):
    """Groups of rows that begin with the same pages; int32.

    `members [E, B]` are row numbers, B for an empty place; `lens [E]` the positions that the
    members have in common, whole pages.
    """

    members: jax.Array
    lens: jax.Array


@dataclass(frozen=True)
class StepSpec:
    """What a step is compiled for besides its shapes: model, kernel backend, and the mesh that
    Pallas kernels split their work over (None: one device)."""

    config: ModelConfig
    backend: str
    mesh: Mesh | None = None

    @property
    def packed(self) -> bool:
        """Whether layers run as one call each, over packed weights."""
        return is_packed(self.backend, self.config)

    def bind(self, weights: Weights) -> Decoder:
        """The decoder over weights that are not packed."""
        return bind(self.config, weights, experts=ExpertsBackend(self.backend, self.mesh))


class PagedAttention:
    """AttentionIO over a page pool: writes the new KV into pages, then attends to the pages.

    `pages` is replaced layer by layer while a step is traced. With `runs`, a step of one token a
    row reads the pages of each run once.
    """

    def __init__(self, spec: StepSpec, pages: Pages, rows: Rows, runs: Runs | None = None):
        self.pages = list(pages)
        self._spec = spec
        self._rows = rows
        self._runs = runs

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Writes k and v `[B, T, kv_heads, head_dim]`."""
        self.pages[layer] = kv_write(
            self.pages[layer],
            k,
            v,
            *self._rows,
            mesh=self._spec.mesh,
            backend=self._spec.backend,
        )

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """Writes k and v, then gives attention of q `[B, T, heads, head_dim]`."""
        self.store(layer, k, v)
        attend, groups = paged_attention, ()
        if self._runs is not None:
            attend, groups = shared_prefix_attention, self._runs
        return attend(
            q,
            self.pages[layer],
            *self._rows,
            *groups,
            sliding_window=self._spec.config.layer(layer).sliding_window,
            soft_cap=self._spec.config.attention_soft_cap,
            sinks=sinks,
            mesh=self._spec.mesh,
            backend=self._spec.backend,
        )


def _positions(rows: Rows, length: int) -> jax.Array:
    return rows.start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]


def prefill_chunk(
    spec: StepSpec, weights: Weights, pages: Pages, tokens: jax.Array, rows: Rows
) -> tuple[Pages, jax.Array]:
    """The prefill module extends the KV of each row by its tokens `[B, T]`; no logits exist.

    Returns the pages, and a scalar that is ready when the chunk has been computed.
    """
    return _write_kv(spec, weights, None, pages, tokens, rows, None)


def replay_chunk(
    spec: StepSpec,
    weights: Weights,
    adapters: Weights | PackedAdapters | None,
    pages: Pages,
    tokens: jax.Array,
    rows: Rows,
    adapter_index: jax.Array,
) -> tuple[Pages, jax.Array]:
    """A decode module writes its own KV of known tokens `[B, T]`: a prompt's tail, or a replay."""
    return _write_kv(spec, weights, adapters, pages, tokens, rows, adapter_index)


def _write_kv(
    spec: StepSpec,
    weights: Weights,
    adapters: Weights | PackedAdapters | None,
    pages: Pages,
    tokens: jax.Array,
    rows: Rows,
    adapter_index: jax.Array | None,
) -> tuple[Pages, jax.Array]:
    positions = _positions(rows, tokens.shape[1])
    if spec.packed:
        decoder = PackedDecoder(spec.config, weights, _packed(adapters), adapter_index)
        _, pages = decoder.hidden(tokens, positions, pages, rows, kv_only=True)
        return pages, jnp.sum(rows.lens)
    io = PagedAttention(spec, pages, rows)
    stacked = _stacked(adapters, adapter_index)
    spec.bind(weights).write_kv(tokens, positions, io, stacked)
    return tuple(io.pages), jnp.sum(rows.lens)


def _next_logits(
    spec: StepSpec,
    weights: Weights,
    adapters: Weights | PackedAdapters | None,
    pages: Pages,
    tokens: jax.Array,
    rows: Rows,
    inputs: DecodeInput,
) -> tuple[Pages, jax.Array, jax.Array | None, jax.Array]:
    """Feeds one token a row, `[B]`.

    Returns the pages, the logits `[B, vocab]`, the most likely tokens `[B]` if those came with
    them, and what `choose` takes. If the tokens came, the logits are undefined where
    `sampler.needs_logits` says no, and both are where sampling is deferred.
    """
    tokens, positions = tokens[:, None], _positions(rows, 1)
    if spec.packed:
        decoder = PackedDecoder(spec.config, weights, _packed(adapters), inputs.adapter_index)
        hidden, pages = decoder.hidden(tokens, positions, pages, rows)
        last, sampling = hidden[:, 0], inputs.sampling
        # The head of a deferred step is left to `choose`, which knows the masks.
        lens = jnp.where(sampling.deferred, 0, rows.lens)
        return pages, *decoder.logits(last, lens, needs_logits(sampling)), last
    io = PagedAttention(spec, pages, rows, inputs.runs)
    decoder = spec.bind(weights)
    # Lives for one trace; this function is traced more than once.
    stacked = _stacked(adapters, inputs.adapter_index)
    hidden = decoder.hidden(tokens, positions, io, stacked)
    logits = decoder.logits(hidden[:, 0])
    return tuple(io.pages), logits, None, logits


def _stacked(adapters: Weights | PackedAdapters | None, index: jax.Array | None) -> Adapters | None:
    if not isinstance(adapters, dict) or index is None:
        return None
    return Adapters(adapters, index)


def _packed(adapters: Weights | PackedAdapters | None) -> PackedAdapters | None:
    return adapters if isinstance(adapters, PackedAdapters) else None


class DecodeInput(NamedTuple):
    """One decode dispatch: the tokens that the history has at `rows.start` are fed; `slots [B]`
    int32 index the history; `adapter_index [B]` int32, -1 for the base's weights; `num_steps` int32
    scalar. With `runs` the step is another executable, which reads shared pages once."""

    rows: Rows
    slots: jax.Array
    adapter_index: jax.Array
    sampling: SamplingRows
    num_steps: jax.Array
    runs: Runs | None = None


def decode_steps(
    spec: StepSpec,
    max_steps: int,
    weights: Weights,
    adapters: Weights | PackedAdapters | None,
    pages: Pages,
    history: History,
    inputs: DecodeInput,
) -> tuple[Pages, History, Sampled, jax.Array]:
    """`inputs.num_steps` (1 .. max_steps) tokens for each row.

    The loop's length is a run-time value, so one executable serves every number of steps. What is
    fed comes from the history, which the step before has written: so a dispatch can be made before
    the tokens of the last one are known to the host.

    Returns the pages, the history, `Sampled` with leading axis `max_steps` (entries past num_steps
    are 0), and what `choose` takes of the last step if sampling is deferred: its logits
    `[B, vocab]`, or for packed weights the last layer's output `[B, embed]`.
    """

    def step(
        i: jax.Array | int, tokens: jax.Array, pages: Pages, history: History
    ) -> tuple[Pages, History, Sampled, jax.Array]:
        rows = inputs.rows._replace(start=inputs.rows.start + i)
        pages, logits, best, left = _next_logits(
            spec, weights, adapters, pages, tokens, rows, inputs
        )
        lengths = rows.start + 1
        view = History(*(array[inputs.slots] for array in history))
        sampled = sample(logits, inputs.sampling, view, lengths, best, mesh=spec.mesh)
        written = history.tokens.at[inputs.slots, lengths].set(sampled.tokens, mode="drop")
        return pages, history._replace(tokens=written), sampled, left

    first = history.tokens[inputs.slots, inputs.rows.start]
    if max_steps == 1:
        pages, history, sampled, left = step(0, first, pages, history)
        return pages, history, Sampled(*(array[None] for array in sampled)), left

    def body(i: jax.Array, carry: tuple) -> tuple:
        tokens, pages, history, outputs, _ = carry
        pages, history, sampled, left = step(i, tokens, pages, history)
        outputs = Sampled(
            *(all_.at[i].set(one) for all_, one in zip(outputs, sampled, strict=True))
        )
        return sampled.tokens, pages, history, outputs, left

    width = spec.config.hidden_size if spec.packed else spec.config.vocab_size
    left = jnp.zeros((len(first), width), jnp.float32)
    carry = first, pages, history, no_samples(max_steps, len(first)), left
    _, *results = lax.fori_loop(0, inputs.num_steps, body, carry)
    return tuple(results)


class Choice(NamedTuple):
    """How tokens of a step are chosen: `mask [B, ceil(vocab / 32)]` uint32, see `sampler.sample`;
    the rest as in the step's `DecodeInput`, `start` and `lens` of its rows."""

    mask: jax.Array
    slots: jax.Array
    start: jax.Array
    lens: jax.Array
    sampling: SamplingRows


def choose(
    config: ModelConfig | None,
    mesh: Mesh | None,
    weights: Weights | None,
    history: History,
    left: jax.Array,
    choice: Choice,
) -> tuple[History, Sampled]:
    """The tokens of a decode step whose sampling was deferred, since masks were not known yet.

    Args:
        config: of the step's model if its weights are packed, so that their head is left to this;
            else None, and unlike models have one program.
        mesh: as of the step.
        weights: packed ones, as of the step; else None.
        history: of all slots.
        left: what `decode_steps` has left, float32.
        choice: how they are chosen.

    Returns the history, and `Sampled` with a leading axis of 1.
    """
    mask, slots, start, lens, sampling = choice
    logits, best = left, None
    if config is not None and weights is not None:
        decoder = PackedDecoder(config, weights)
        logits, best = decoder.logits(left, lens, needs_logits(sampling), mask)
    view = History(*(array[slots] for array in history))
    sampled = sample(logits, sampling, view, start + 1, best, mask, mesh)
    written = history.tokens.at[slots, start + 1].set(sampled.tokens, mode="drop")
    return history._replace(tokens=written), Sampled(*(array[None] for array in sampled))


def admit(
    history: History,
    slot: jax.Array,
    tokens: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
) -> History:
    """Writes the known tokens `[max_len]` and the biases of a new sequence into its slot."""
    return History(
        history.tokens.at[slot].set(tokens),
        history.bias_ids.at[slot].set(bias_ids),
        history.bias_values.at[slot].set(bias_values),
    )
