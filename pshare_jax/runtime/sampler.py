"""Choosing the next token on the device: masks, penalties, bias, temperature, min-p, top-k, top-p.

Every feature sits behind a `lax.cond` on whether any row of the batch asks for it, so that one
executable serves all requests and greedy decoding pays for an argmax only. Thresholds of top-k and
top-p are found by bisection on the bits of the float32 scores, which is exact (ties are kept) and
needs no sort.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pshare_jax.core.requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, TokenLogprobs
from pshare_jax.runtime.host_arrays import host_array
from pshare_jax.sharding.rules import replicated

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: the scores would overflow."""

MIN_TOP_P = 1e-30
"""The least nucleus that is asked for; it always holds the most likely token."""


class SamplingRows(NamedTuple):
    """Sampling parameters of a batch: float32 or int32 `[B]`, bool scalars for the batch."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    top_k: jax.Array
    seed: jax.Array
    prompt_len: jax.Array
    any_penalty: jax.Array
    any_bias: jax.Array
    any_random: jax.Array
    any_filter: jax.Array
    any_logprobs: jax.Array
    deferred: jax.Array

    def later(self) -> SamplingRows:
        """For a step whose tokens are chosen by another one: it only computes the logits."""
        no, yes = host_array(False, np.bool_), host_array(True, np.bool_)
        return self._replace(
            any_penalty=no,
            any_bias=no,
            any_random=no,
            any_filter=no,
            any_logprobs=no,
            deferred=yes,
        )


class History(NamedTuple):
    """What sampling needs to know of each row: tokens so far, and the logit bias.

    `tokens [B, max_len]` int32; `bias_ids [B, MAX_LOGIT_BIAS]` int32, -1 where unused;
    `bias_values` float32 of that shape. Kept on the device, one row a decode slot.
    """

    tokens: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array


class Sampled(NamedTuple):
    """Chosen tokens `[B]` int32, their log-probabilities, and the MAX_LOGPROBS most likely.

    Log-probabilities (natural log, of the unmodified distribution) are 0 when no row asks.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def no_samples(steps: int, batch: int) -> Sampled:
    """Room for the results of `steps` steps: zeros with a leading axis."""
    return Sampled(
        tokens=jnp.zeros((steps, batch), jnp.int32),
        logprobs=jnp.zeros((steps, batch), jnp.float32),
        top_ids=jnp.zeros((steps, batch, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((steps, batch, MAX_LOGPROBS), jnp.float32),
    )


def pack_rows(
    params: list[SamplingParams], seeds: list[int], prompt_lens: list[int], batch: int
) -> SamplingRows:
    """Host-side packing of the rows' parameters into numpy arrays, padded to `batch` rows."""
    pad = batch - len(params)
    rows = [*params, *[SamplingParams(temperature=0.0)] * pad]

    def floats(name: str) -> jax.Array:
        return host_array([getattr(row, name) for row in rows], np.float32)

    def any_of(test: Callable[[SamplingParams], bool]) -> jax.Array:
        return host_array(any(map(test, params)), np.bool_)

    return SamplingRows(
        temperature=host_array([p.temperature * _is_random(p) for p in rows], np.float32),
        top_p=host_array([max(p.top_p, MIN_TOP_P) for p in rows], np.float32),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        presence_penalty=floats("presence_penalty"),
        frequency_penalty=floats("frequency_penalty"),
        top_k=host_array([row.top_k for row in rows], np.int32),
        seed=host_array([*seeds, *[0] * pad], np.uint32),
        prompt_len=host_array([*prompt_lens, *[0] * pad], np.int32),
        any_penalty=any_of(_has_penalty),
        any_bias=any_of(lambda p: len(p.logit_bias) > 0),
        any_random=any_of(_is_random),
        any_filter=any_of(_has_filter),
        any_logprobs=any_of(lambda p: p.logprobs is not None),
        deferred=host_array(False, np.bool_),
    )


def _has_penalty(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _is_random(p: SamplingParams) -> bool:
    return p.temperature >= MIN_TEMPERATURE


def _has_filter(p: SamplingParams) -> bool:
    return _is_random(p) and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)


def needs_logits(rows: SamplingRows) -> jax.Array:
    """Whether any row wants more of the logits than which is the highest; bool scalar."""
    return rows.any_penalty | rows.any_bias | rows.any_random | rows.any_logprobs


# Under jit: the programs of unlike steps have it traced once.
@functools.partial(jax.jit, static_argnames="mesh")
def sample(
    logits: jax.Array,
    rows: SamplingRows,
    history: History,
    lengths: jax.Array,
    best: jax.Array | None = None,
    mask: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Sampled:
    """The next token of each row.

    Args:
        logits: `[B, V]` float32.
        rows: the rows' parameters.
        history: the rows' tokens and biases.
        lengths: `[B]` int32, known tokens of each row; also the position of the new token, which
            together with the seed determines the random draw.
        best: `[B]` int32, the most likely tokens that may be chosen, if they are known; then the
            logits need not be defined unless `needs_logits`.
        mask: `[B, ceil(V / 32)]` uint32, the tokens that may be chosen: bit i % 32 of word i // 32
            is that of token i. Log-probabilities are those without it.
        mesh: the devices over which the vocabulary may be split; None is one device.
    """

    def chosen(logits: jax.Array) -> jax.Array:
        scores = logits if mask is None else _masked(logits, mask)
        return _choose(scores, rows, history, lengths, mesh)

    if best is None:
        tokens = chosen(logits)
    else:
        by_best = ~(rows.any_penalty | rows.any_bias | rows.any_random)
        tokens = lax.cond(by_best, lambda x: best, chosen, logits)
    logprobs, top_ids, top_logprobs = lax.cond(
        rows.any_logprobs, _logprobs, _no_logprobs, logits, tokens
    )
    return Sampled(tokens, logprobs, top_ids, top_logprobs)


def _masked(logits: jax.Array, mask: jax.Array) -> jax.Array:
    vocab = logits.shape[-1]
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(len(mask), -1)[:, :vocab] == 1, logits, -jnp.inf)


def _choose(
    logits: jax.Array,
    rows: SamplingRows,
    history: History,
    lengths: jax.Array,
    mesh: Mesh | None,
) -> jax.Array:
    scores = lax.cond(
        rows.any_penalty, lambda x: _penalise(x, rows, history, lengths), lambda x: x, logits
    )
    scores = lax.cond(rows.any_bias, lambda x: _add_bias(x, history), lambda x: x, scores)
    return lax.cond(
        rows.any_random,
        lambda x: _draw(x, rows, lengths, mesh),
        _best,
        scores,
    )


def _penalise(
    logits: jax.Array, rows: SamplingRows, history: History, lengths: jax.Array
) -> jax.Array:
    """Repetition (over prompt and output), presence and frequency (over output) penalties."""
    batch, vocab = logits.shape
    index = jnp.arange(batch)[:, None]
    position = jnp.arange(history.tokens.shape[1])[None, :]
    known = position < lengths[:, None]
    generated = known & (position >= rows.prompt_len[:, None])
    zeros = jnp.zeros((batch, vocab), jnp.float32)
    seen = zeros.at[index, history.tokens].max(known.astype(jnp.float32)) > 0
    counts = zeros.at[index, history.tokens].add(generated.astype(jnp.float32))
    penalty = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - rows.frequency_penalty[:, None] * counts
    return logits - rows.presence_penalty[:, None] * (counts > 0)


def _add_bias(logits: jax.Array, history: History) -> jax.Array:
    index = jnp.arange(logits.shape[0])[:, None]
    used = history.bias_ids >= 0
    ids = jnp.where(used, history.bias_ids, 0)
    return logits.at[index, ids].add(jnp.where(used, history.bias_values, 0.0))


def _draw(
    scores: jax.Array, rows: SamplingRows, lengths: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """Gumbel-max draw at the row's temperature; temperature 0 takes the argmax."""
    greedy = _best(scores)
    random = rows.temperature > 0
    scaled = scores / jnp.where(random, rows.temperature, 1.0)[:, None]
    scaled = lax.cond(
        rows.any_filter, lambda x: _filter(_whole(x, mesh), rows), lambda x: x, scaled
    )

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, scores.shape[1:], jnp.float32)

    drawn = _best(scaled + jax.vmap(noise)(rows.seed, lengths))
    return jnp.where(random, drawn, greedy)


def _best(scores: jax.Array) -> jax.Array:
    """What `jnp.argmax` gives; on a CPU XLA's takes six times as long as these two passes."""
    vocab = scores.shape[-1]
    highest = jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.arange(vocab, dtype=jnp.int32)
    # Without a highest one, which NaN is not, the last is as good as any.
    return jnp.min(jnp.where(scores == highest, ids, vocab - 1), axis=-1)


def _whole(scores: jax.Array, mesh: Mesh | None) -> jax.Array:
    """All scores on every device: one message, where each step of a bisection would take one."""
    if mesh is None or mesh.size == 1:
        return scores
    return lax.with_sharding_constraint(scores, replicated(mesh))


def _filter(scores: jax.Array, rows: SamplingRows) -> jax.Array:
    """min-p, then top-k, then top-p; what falls out becomes -inf."""
    vocab = scores.shape[-1]
    relative = scores - jnp.max(scores, axis=-1, keepdims=True)
    log_min_p = jnp.log(jnp.maximum(rows.min_p, 0.0))[:, None]
    scores = jnp.where(relative >= log_min_p, scores, -jnp.inf)
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab).astype(jnp.float32)
    order = _sortable(scores)
    kth = _threshold(order, jnp.ones_like(scores), top_k)
    scores = jnp.where(order >= kth[:, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    nucleus = _threshold(order, probabilities, rows.top_p)
    limited = jnp.where(order >= nucleus[:, None], scores, -jnp.inf)
    return jnp.where((rows.top_p < 1)[:, None], limited, scores)


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, mass: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest uint32 t a row such that the mass of the entries >= t is at least `wanted`."""

    def refine(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        kept = jnp.sum(jnp.where(order >= candidate[:, None], mass, 0.0), axis=-1)
        return jnp.where(kept >= wanted, candidate, threshold)

    return lax.fori_loop(0, 32, refine, jnp.zeros(order.shape[:1], jnp.uint32))


def _logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normaliser
    count = min(MAX_LOGPROBS, logits.shape[-1])
    values, ids = lax.top_k(logits, count)
    padding = ((0, 0), (0, MAX_LOGPROBS - count))
    values = jnp.pad(values - normaliser[:, None], padding, constant_values=-jnp.inf)
    return chosen, jnp.pad(ids.astype(jnp.int32), padding), values


def _no_logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = tokens.shape[0]
    return (
        jnp.zeros(batch, jnp.float32),
        jnp.zeros((batch, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((batch, MAX_LOGPROBS), jnp.float32),
    )


def empty_history(num_slots: int, max_len: int) -> History:
    """History of `num_slots` decode slots and one more, the last, which padding rows use."""
    slots = num_slots + 1
    return History(
        tokens=jnp.zeros((slots, max_len), jnp.int32),
        bias_ids=jnp.full((slots, MAX_LOGIT_BIAS), -1, jnp.int32),
        bias_values=jnp.zeros((slots, MAX_LOGIT_BIAS), jnp.float32),
    )


def row_logprobs(sampled: Sampled, row: int, steps: int, count: int | None) -> list[TokenLogprobs]:
    """What one row of a dispatch is told: an entry a token with `count` alternatives.

    Args:
        sampled: on the host, with a leading axis of steps.
        row: the row.
        steps: steps that were taken.
        count: alternatives that were asked for; None if log-probabilities were not.
    """
    if count is None:
        return []
    entries: list[TokenLogprobs] = []
    for step in range(steps):
        ids = sampled.top_ids[step, row, :count].tolist()
        values = sampled.top_logprobs[step, row, :count].tolist()
        top = tuple(zip(ids, values, strict=True))
        entries.append(TokenLogprobs(float(sampled.logprobs[step, row]), top))
    return entries
