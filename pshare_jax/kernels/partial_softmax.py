"""Attention over a part of the keys, and how parts become the whole: log-sum-exp merging.

A softmax over keys that are read in several places is kept as its highest score, the total of its
weights relative to that score, and the values so weighted, all in float32. Parts are merged by
moving them to a common highest score (Milakov and Gimelshein, 2018, arXiv 1805.02867). Keeping
highest and total apart, and not their log-sum-exp, loses no digits where scores are large.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a key that is not seen: finite, so that a query that sees nothing makes no NaN."""


class PartialSoftmax(NamedTuple):
    """Softmax over some of the keys, float32: `highest [...]`, `total [...]`, `values [..., D]`.

    A query that saw none of the keys has highest `MASKED` and anything finite besides: merged with
    a part that saw one, it counts nothing.
    """

    highest: jax.Array
    total: jax.Array
    values: jax.Array

    def result(self, dtype: jnp.dtype) -> jax.Array:
        """The attention's output `[..., D]`; 0 where total is 0."""
        total = jnp.maximum(self.total, jnp.finfo(jnp.float32).tiny)
        return (self.values / total[..., None]).astype(dtype)


def nothing(shape: tuple[int, ...], head_dim: int) -> PartialSoftmax:
    """A softmax over no keys, of queries `shape`."""
    zero = jnp.zeros(shape, jnp.float32)
    return PartialSoftmax(zero + MASKED, zero, jnp.zeros((*shape, head_dim), jnp.float32))


def merge(a: PartialSoftmax, b: PartialSoftmax) -> PartialSoftmax:
    """The softmax over the keys of both parts, which have none in common."""
    highest = jnp.maximum(a.highest, b.highest)
    of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    values = a.values * of_a[..., None] + b.values * of_b[..., None]
    return PartialSoftmax(highest, a.total * of_a + b.total * of_b, values)


def with_sinks(softmax: PartialSoftmax, sinks: jax.Array) -> PartialSoftmax:
    """The softmax over one score more, which takes weight and gives nothing (arXiv 2309.17453).

    Args:
        softmax: of queries `[..., *heads]`.
        sinks: the score of each head, `[*heads]`.
    """
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), softmax.highest.shape)
    highest = jnp.maximum(softmax.highest, sinks)
    kept = jnp.exp(softmax.highest - highest)
    total = softmax.total * kept + jnp.exp(sinks - highest)
    return PartialSoftmax(highest, total, softmax.values * kept[..., None])


def merge_first_axis(parts: PartialSoftmax) -> PartialSoftmax:
    """The softmax over the keys of all parts along the first axis."""
    highest = parts.highest.max(axis=0)
    weight = jnp.exp(parts.highest - highest)
    values = (parts.values * weight[..., None]).sum(axis=0)
    return PartialSoftmax(highest, (parts.total * weight).sum(axis=0), values)
