"""Greedy generation with weights in training: many prompts at once over a dense cache.

The trainer's own decoding, apart from the engine's pages, batches and threads. Each prompt says how
many of its tokens the prefill module covers: all but the split rule's tail as a module is served,
none for an ordinary fine-tune, or any share between, to see what that does to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.models.attention import KV, DenseCache, init_cache
from pshare_jax.models.weights import Weights
from pshare_jax.train.batches import MicroBatch
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.kv_store import KVStore
from pshare_jax.train.loss import Recipe, base_kv, bind_trainable

_PROMPT_MULTIPLE = 32


class Prompt(NamedTuple):
    """Token ids, at least one, and how many of them the prefill module covers: not the last."""

    tokens: Sequence[int]
    cover: int


class _Batch(NamedTuple):
    """B prompts, padded.

    Args:
        kv: `[B, P, layers, 2, kv_heads, head_dim]` of what the prefill module reads; P may be 0.
        suffix: `[B, T]` int32: what the decode module reads, from the cover on.
        cover: `[B]` int32.
        length: `[B]` int32: tokens of each prompt.
    """

    kv: jax.Array
    suffix: jax.Array
    cover: jax.Array
    length: jax.Array


def generate(
    recipe: Recipe,
    trainable: Weights,
    base: Weights,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    end_token_ids: Sequence[int],
    batch_size: int = 32,
    store: KVStore | None = None,
    make_kv: Callable[[np.ndarray], jax.Array] | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Completes prompts greedily.

    Args:
        recipe: static facts; `teacher` and `remat` do not matter.
        trainable: full weights, or LoRA factors.
        base: the prefill module's weights.
        prompts: in any order.
        max_tokens: most tokens of a completion.
        end_token_ids: a completion ends with the first of these.
        batch_size: prompts that are completed together.
        store: has the prefill module's KV of each prompt, in the order of `prompts`, as far as the
            prompt is covered; None computes it.
        make_kv: computes what takes the place of that KV, as `loss.base_kv` gives it, from
            `prompt [B, P]` int32.
        report: gets the number of prompts done after each batch.

    Returns:
        The token ids of each completion, in the order of `prompts`, the end token included.

    Raises:
        ValueError: a prompt that is empty, or covered up to its last token.
    """
    for prompt in prompts:
        if not 0 <= prompt.cover < len(prompt.tokens):
            raise ValueError(
                f"a prompt of {len(prompt.tokens)} tokens cannot be covered for {prompt.cover}: "
                "the decode module reads at least the last one"
            )
    ends = jnp.asarray(sorted(set(end_token_ids)) or [-1], jnp.int32)
    outputs: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        kv = _covered_kv(recipe, base, prompts, members, batch_size, store, make_kv)
        batch = _collate([prompts[i] for i in members], kv, batch_size)
        tokens = np.asarray(_complete(recipe, max_tokens, trainable, base, batch, ends))
        for row, i in enumerate(members):
            outputs[i] = _until_end(tokens[row].tolist(), set(end_token_ids))
        report(len(members))
    return outputs


_base_kv = jax.jit(base_kv, static_argnums=0)


def prompt_kv(recipe: Recipe, base: Weights, prompt: np.ndarray) -> jax.Array:
    """See `loss.base_kv`; compiled once for each shape, whatever else the recipe says."""
    facts = Recipe(recipe.config, recipe.dtype, matmul=recipe.matmul)
    return _base_kv(facts, base, prompt)


def _covered_kv(
    recipe: Recipe,
    base: Weights,
    prompts: Sequence[Prompt],
    members: Sequence[int],
    size: int,
    store: KVStore | None,
    make_kv: Callable[[np.ndarray], jax.Array] | None,
) -> jax.Array:
    """KV of what the prefill module covers of the prompts `members`, padded to `size` rows."""
    length = _round_up(max(prompts[i].cover for i in members))
    if length and store is not None:
        bucket = Bucket(prompt=length, decode=0, targets=0, sequence=0)
        return jax.device_put(store.load(MicroBatch(bucket, tuple(members)), size))
    prompt = np.zeros((size, length), np.int32)
    for row, i in enumerate(members):
        cover = prompts[i].cover
        prompt[row, :cover] = prompts[i].tokens[:cover]
    if length:
        return make_kv(prompt) if make_kv is not None else prompt_kv(recipe, base, prompt)
    config = recipe.config
    return jnp.zeros(
        (size, 0, config.num_layers, 2, config.num_kv_heads, config.head_dim), recipe.dtype
    )


def _collate(prompts: Sequence[Prompt], kv: jax.Array, size: int) -> _Batch:
    """Pads with zeros, and with prompts of one token to `size` rows."""
    prompts = [*prompts, *[Prompt([0], 0)] * (size - len(prompts))]
    longest_suffix = max(len(p.tokens) - p.cover for p in prompts)
    suffix = np.zeros((size, 1 if longest_suffix == 1 else _round_up(longest_suffix)), np.int32)
    for i, p in enumerate(prompts):
        suffix[i, : len(p.tokens) - p.cover] = p.tokens[p.cover :]
    cover = np.asarray([p.cover for p in prompts], np.int32)
    length = np.asarray([len(p.tokens) for p in prompts], np.int32)
    return _Batch(kv, *map(jax.device_put, (suffix, cover, length)))


def _round_up(length: int) -> int:
    return -(-length // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


class _Carry(NamedTuple):
    """Between two tokens: tokens done, the newest `[B]`, and which rows have ended."""

    done: jax.Array
    token: jax.Array
    ended: jax.Array
    outputs: jax.Array
    cache: list[KV]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _complete(
    recipe: Recipe,
    max_tokens: int,
    trainable: Weights,
    base: Weights,
    batch: _Batch,
    ends: jax.Array,
) -> jax.Array:
    """`[B, max_tokens]` int32; what follows an end token means nothing."""
    config = recipe.config
    size, prompt_slots = batch.kv.shape[:2]
    suffix_len = batch.suffix.shape[1]
    # What stands behind a row's cover, of longer ones or of padding, is overwritten before the
    # first token that could see it; so is what stands behind its prompt.
    slots = prompt_slots + suffix_len + max_tokens
    cache = [
        (
            k.at[:, :prompt_slots].set(batch.kv[:, :, i, 0]),
            v.at[:, :prompt_slots].set(batch.kv[:, :, i, 1]),
        )
        for i, (k, v) in enumerate(init_cache(config, size, slots, jnp.dtype(recipe.dtype)))
    ]
    decoder, adapters = bind_trainable(recipe, trainable, base, size)

    def step(
        tokens: jax.Array, start: jax.Array, last: jax.Array, cache: list[KV]
    ) -> tuple[jax.Array, list[KV]]:
        io = DenseCache(config, cache, start)
        steps = start[:, None] + jnp.arange(tokens.shape[1])
        hidden = decoder.hidden(tokens, steps, io, adapters)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return jnp.argmax(decoder.logits(hidden)[:, 0], axis=-1).astype(jnp.int32), io.cache

    first, cache = step(batch.suffix, batch.cover, batch.length - 1 - batch.cover, cache)
    outputs = jnp.zeros((size, max_tokens), jnp.int32).at[:, 0].set(first)
    ended = jnp.isin(first, ends)
    none = jnp.zeros(size, jnp.int32)

    def body(carry: _Carry) -> _Carry:
        last = batch.length + carry.done - 1
        token, cache = step(carry.token[:, None], last, none, carry.cache)
        outputs = carry.outputs.at[:, carry.done].set(token)
        return _Carry(carry.done + 1, token, carry.ended | jnp.isin(token, ends), outputs, cache)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.done < max_tokens) & ~jnp.all(carry.ended)

    start = _Carry(jnp.int32(1), first, ended, outputs, cache)
    return jax.lax.while_loop(unfinished, body, start).outputs
