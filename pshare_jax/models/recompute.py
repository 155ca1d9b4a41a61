"""Computing a layer again for the gradient instead of keeping what it computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Apply = Callable[[jax.Array], jax.Array]


def recomputed(apply: Apply) -> Apply:
    """As `apply`, but of its computation the gradient finds the input only.

    For CPUs. `jax.checkpoint` keeps XLA from merging the second computation with the first by
    barriers, which XLA removes on CPUs before it merges: nothing is saved there. Here the second
    one's input is made to depend on the gradient that comes in, by adding zero times it, so that it
    is another computation, and cannot begin before its time.

    Args:
        apply: from an array to an array; may close over others, which get gradients too.
    """

    def call(x: jax.Array) -> jax.Array:
        function, closed_over = jax.closure_convert(apply, x)
        return _recomputed(function, x, *closed_over)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(function: Callable[..., jax.Array], x: jax.Array, *rest: Any) -> jax.Array:
    return function(x, *rest)


def _forward(
    function: Callable[..., jax.Array], x: jax.Array, *rest: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return function(x, *rest), (x, *rest)


def _backward(
    function: Callable[..., jax.Array], kept: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    x, *rest = kept
    zero = jnp.zeros((), x.dtype) * gradient[(0,) * gradient.ndim].astype(x.dtype)
    _, pull = jax.vjp(function, x + zero, *rest)
    return pull(gradient)


_recomputed.defvjp(_forward, _backward)
