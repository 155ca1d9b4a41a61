"""Cross-entropy over a large vocabulary: few passes over the logits, and few of them at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 1024
"""Most targets of a chunk, over all rows of a batch."""

Losses = Callable[..., jax.Array]


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The negative logarithm of the softmax at the labels, in nats.

    Of the logits the gradient keeps nothing but themselves and two numbers for each target: it is
    softmax minus one-hot, made in one pass. Derived by JAX it keeps and adds up several arrays of
    the size of the logits.

    Args:
        logits: `[..., vocab]` float32.
        labels: `[...]` int32, in range.

    Returns:
        `[...]` float32.
    """
    return _forward(logits, labels)[0]


def _forward(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    highest = jnp.max(logits, axis=-1)
    # Apart, since their sum may be large and would be rounded.
    rest = jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return rest - (chosen - highest), (logits, labels, highest, rest)


def _backward(
    kept: tuple[jax.Array, jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    logits, labels, highest, rest = kept
    weights = jnp.exp(logits - highest[..., None] - rest[..., None])
    ids = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return gradient[..., None] * (weights - (ids == labels[..., None])), None


cross_entropy.defvjp(_forward, _backward)


def sum_over_chunks(
    losses: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array],
    hidden: jax.Array,
    targets: Mapping[str, jax.Array],
) -> jax.Array:
    """The sum of a loss over all targets, some at a time; float32 scalar.

    Where a gradient is asked for it is made beside the loss, chunk by chunk, so that logits are
    neither kept nor computed twice; those of weights are added up in float32. The results are
    those of the whole, within rounding.

    Args:
        losses: gives the sum of some: from `[B, c, embed]` and arrays `[B, c, ...]`; may close over
            arrays, which get gradients too.
        hidden: `[B, Y, embed]`.
        targets: arrays `[B, Y, ...]`; `weights`, 0 for padding, is one of them.
    """
    B, Y = hidden.shape[:2]
    if B * Y <= CHUNK:
        return losses(hidden, targets)
    count = min(-(-B * Y // CHUNK), Y)
    size = -(-Y // count)  # all alike: what fills up the last one is computed too
    first = jax.tree.map(lambda array: array[:, :size], (hidden, dict(targets)))
    function, weights = jax.closure_convert(losses, *first)
    return _summed(function, size, hidden, dict(targets), *weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    losses: Losses, size: int, hidden: jax.Array, targets: dict[str, jax.Array], *weights: Any
) -> jax.Array:
    def add(total: jax.Array, chunk: tuple[jax.Array, dict]) -> tuple[jax.Array, None]:
        return total + losses(*chunk, *weights), None

    total, _ = jax.lax.scan(add, jnp.float32(0), _chunks(size, hidden, targets))
    return total


def _summed_forward(
    losses: Losses, size: int, hidden: Any, targets: dict[str, Any], *weights: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Arguments come with whether they need a gradient, which frozen weights do not."""
    plain = jax.tree.map(lambda x: x.value, targets, is_leaf=lambda x: hasattr(x, "perturbed"))
    values, wanted = [w.value for w in weights], [w.perturbed for w in weights]
    own = [value for value, wants in zip(values, wanted, strict=True) if wants]

    def add(carry: tuple[jax.Array, list], chunk: tuple[jax.Array, dict]) -> tuple[Any, jax.Array]:
        hidden, targets = chunk

        def loss(hidden: jax.Array, *own: jax.Array) -> jax.Array:
            left = iter(own)
            pairs = zip(values, wanted, strict=True)
            used = [next(left) if wants else value for value, wants in pairs]
            return losses(hidden, targets, *used)

        found, pull = jax.vjp(loss, hidden, *own)
        dx, *more = pull(jnp.float32(1))
        total, sums = carry
        sums = [sum_ + gradient for sum_, gradient in zip(sums, more, strict=True)]
        return (total + found, sums), dx

    begin = jnp.float32(0), [jnp.zeros(value.shape, jnp.float32) for value in own]
    (total, sums), dx = jax.lax.scan(add, begin, _chunks(size, hidden.value, plain))
    left = iter(sums)
    gradients = [next(left) if wants else None for wants in wanted]
    return total, (_joined(dx, hidden.value.shape[1]), gradients, values)


def _summed_backward(
    losses: Losses, size: int, kept: tuple[Any, ...], gradient: Any
) -> tuple[Any, ...]:
    del losses, size
    dx, sums, values = kept
    scaled = [
        None if sum_ is None else (gradient * sum_).astype(value.dtype)
        for sum_, value in zip(sums, values, strict=True)
    ]
    return (gradient * dx).astype(dx.dtype), None, *scaled


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _chunks(size: int, *arrays: Any) -> Any:
    """Each array `[B, Y, ...]` -> `[chunks, B, size, ...]`, the last chunk filled with zeros."""

    def cut(array: jax.Array) -> jax.Array:
        B, Y = array.shape[:2]
        padded = jnp.pad(array, ((0, 0), (0, -Y % size), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(B, -1, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`, of one array."""
    together = jnp.moveaxis(chunks, 0, 1)
    return together.reshape(together.shape[0], -1, *together.shape[3:])[:, :length]
