"""The layout of the weights that the C++ layers read.

A matrix is cut into panels of columns, see `native/src/gemm.h`. All matrices of all layers make up
one array and all vectors another: few large arrays are cheap to pass to a step, and lie in large
memory pages. The order within a layer is that of `locate` in `native/src/layer.h`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections that adapters may be on, in the order of the C++ side."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "matrices"],
    meta_fields=["bias", "qk_norm", "post_norms"],
)
@dataclass(frozen=True)
class PackedLayers:
    """The weights of all layers.

    Args:
        vectors: `[layers, m]` float32: scales of the two norms, then qkv's bias padded like its
            columns, then the scales of the norms of q and k, then those of the norms after both
            blocks, where the architecture has them. Last, of matrices of 8 bits, the scales of
            their columns, laid out as these.
        matrices: `[layers, n]` float32, bfloat16, or uint8 for whole numbers plus 128: packed
            qkv, o, gate and up with alternating panels, and down.
        bias: whether there is a bias.
        qk_norm: whether q and k are normalised.
        post_norms: whether blocks' outputs are.
    """

    vectors: jax.Array
    matrices: jax.Array
    bias: bool
    qk_norm: bool
    post_norms: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors"],
    meta_fields=["num", "rank", "targets"],
)
@dataclass(frozen=True)
class PackedAdapters:
    """Stacked LoRA modules of all layers.

    Args:
        factors: `[layers, n]`: of each target, in the order of `TARGETS`, packed A
            `[inputs, num * rank]` and packed B `[num * rank, outputs]`, scales folded into B.
        num: number of modules.
        rank: their rank, padded with zeros to an even number.
        targets: what they adapt.
    """

    factors: jax.Array
    num: int
    rank: int
    targets: tuple[str, ...]


def unpack_columns(packed: jax.Array, inputs: int, columns: int, index: jax.Array) -> jax.Array:
    """Some columns of one packed matrix.

    Args:
        packed: as made by `native.loading.pack_into` of one matrix `[K, N]`.
        inputs: K.
        columns: of a panel.
        index: int32, any shape; what is out of range gives some column.

    Returns:
        `[*index.shape, K]`; of a matrix of 8 bits whole numbers, as int32.
    """
    unit = 4 // packed.dtype.itemsize
    panels = packed.reshape(-1, -(-inputs // unit), columns, unit)
    found = panels.at[index // columns, :, index % columns].get(mode="clip")
    found = found.reshape(*index.shape, -1)[..., :inputs]
    return found.astype(jnp.int32) - 128 if packed.dtype == jnp.uint8 else found


def pad_columns(rows: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Vectors `[N_i]` one after the other, laid out like the columns of `pack_into`."""
    return np.concatenate([np.pad(row, (0, -row.shape[0] % columns)) for row in rows])
