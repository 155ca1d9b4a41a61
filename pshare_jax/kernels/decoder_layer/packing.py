"""The layout of matrices that the C++ products read: panels of columns, see `native/src/gemm.h`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def pack(matrices: Sequence[jax.Array], columns: int, *, interleave: bool = False) -> jax.Array:
    """Matrices `[K, N_i]` side by side as panels `[panels, K / unit, columns, unit]`.

    A unit is two rows of bfloat16 or one of float32. Each matrix begins with a panel of its own and
    is padded with zeros to whole panels.

    Args:
        matrices: of one dtype and one K.
        columns: of a panel, `Library.panel_columns`.
        interleave: let the panels of the matrices, which are of one shape, alternate.
    """
    unit = 2 if matrices[0].dtype == jnp.bfloat16 else 1
    packed = [_panels(matrix, columns, unit) for matrix in matrices]
    if interleave:
        panels = jnp.stack(packed, axis=1)
        return panels.reshape(-1, *panels.shape[2:])
    return jnp.concatenate(packed)


def pad_columns(rows: Sequence[jax.Array], columns: int) -> jax.Array:
    """Vectors `[N_i]` one after the other, laid out like the columns of `pack`."""
    return jnp.concatenate([jnp.pad(row, (0, -row.shape[0] % columns)) for row in rows])


def _panels(matrix: jax.Array, columns: int, unit: int) -> jax.Array:
    k, n = matrix.shape
    padded = jnp.pad(matrix, ((0, -k % unit), (0, -n % columns)))
    split = padded.reshape(-1, unit, padded.shape[1] // columns, columns)
    return split.transpose(2, 0, 3, 1)
