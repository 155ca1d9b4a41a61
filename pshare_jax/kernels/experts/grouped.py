"""Grouped experts by grouped products: rows sorted by expert, three products, and back.

XLA's `ragged_dot` has native lowerings on TPUs and gradients everywhere. On TPUs bfloat16 goes
through the Pallas kernel that JAX comes with (megablox `gmm`); float32 does not, since that kernel
would round its operands to bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pshare_jax.kernels.experts.gating import Biases, gated

TILE = 128
"""Rows, inputs and outputs of one step of the Pallas kernel, at most."""

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Rows `[R, in]`, kernels `[X, in, out]` and rows of each expert `[X]` -> `[R, out]` float32."""


class Sorted(NamedTuple):
    """Rows of tokens by expert: `token [R]` and `expert [R]` of each, `place [N * k]` of each
    choice among them, and `sizes [X]` of the groups. Choices that are no expert come last."""

    token: jax.Array
    expert: jax.Array
    place: jax.Array
    sizes: jax.Array


def sort_by_expert(chosen: jax.Array, num_experts: int) -> Sorted:
    """The order for `chosen [N, k]`; numbers from `num_experts` on are no expert."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    place = jnp.zeros_like(rows).at[order].set(rows)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    return Sorted((order // chosen.shape[1]).astype(jnp.int32), flat[order], place, sizes)


def combine(
    rows: jax.Array, weights: jax.Array, place: jax.Array, is_expert: jax.Array
) -> jax.Array:
    """Weighted sums `[N, embed]` float32 of rows `[R, embed]` for `weights [N, k]`.

    Choices that `is_expert [N, k]` calls none count nothing, whatever their rows hold.
    """
    taken = rows[place].reshape(*weights.shape, -1).astype(jnp.float32)
    taken = jnp.where(is_expert[..., None], taken, 0)
    return jnp.sum(taken * weights[..., None], axis=1)


def _experts(
    product: Product,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    biases: Biases | None = None,
    limit: float | None = None,
) -> jax.Array:
    rows = sort_by_expert(chosen, gate.shape[0])
    inputs = x[rows.token]
    of_gate, of_up, of_down = biases or (None,) * 3

    def biased(a: jax.Array, kernels: jax.Array, bias: jax.Array | None) -> jax.Array:
        out = product(a, kernels, rows.sizes)
        if bias is None:
            return out
        return out + jnp.take(bias, rows.expert, axis=0, mode="clip").astype(jnp.float32)

    hidden = gated(biased(inputs, gate, of_gate), biased(inputs, up, of_up), limit)
    outputs = biased(hidden.astype(x.dtype), down, of_down)
    return combine(outputs, weights, rows.place, chosen < gate.shape[0])


def _ragged_dot(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.ragged_dot(
        rows, kernels, sizes, precision=precision, preferred_element_type=jnp.float32
    )


def _megablox(
    rows: jax.Array, kernels: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    # Imported here: it brings the TPU dialect of Pallas, which no other platform needs.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    if rows.dtype == jnp.float32 and not interpret:
        return _ragged_dot(rows, kernels, sizes)
    count, inputs = rows.shape
    padding = -count % TILE
    # Rows of padding belong to the last expert, so that every row is computed.
    sizes = sizes.at[-1].add(count + padding - jnp.sum(sizes))
    out = gmm(
        jnp.pad(rows, ((0, padding), (0, 0))),
        kernels,
        sizes,
        preferred_element_type=jnp.float32,
        tiling=(TILE, min(TILE, inputs), min(TILE, kernels.shape[2])),
        interpret=interpret,
    )
    return out[:count]


with_ragged_dot = functools.partial(_experts, _ragged_dot)
with_megablox = functools.partial(_experts, _megablox)
with_interpreted_megablox = functools.partial(
    _experts, functools.partial(_megablox, interpret=True)
)
