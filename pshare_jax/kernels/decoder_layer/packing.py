"""The layout of the weights that the C++ layers read.

A matrix is cut into panels of columns, see `native/src/gemm.h`. All matrices of all layers make up
one array and all vectors another: few large arrays are cheap to pass to a step, and lie in large
memory pages. The order within a layer is that of `locate` in `native/src/layer.h`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
            blocks, where the architecture has them.
        matrices: `[layers, n]` float32 or bfloat16: packed qkv, o, gate and up with alternating
            panels, and down.
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


def pack(
    matrices: Sequence[np.ndarray], columns: int, *, interleave: bool = False
) -> list[np.ndarray]:
    """Matrices `[K, N_i]` side by side as panels `[panels, K / unit, columns, unit]`, flattened.

    A unit is two rows of bfloat16 or one of float32. Each matrix begins with a panel of its own and
    is padded with zeros to whole panels. It is done by numpy, on one core and mostly without the
    GIL: modules are packed while others are being served.

    Args:
        matrices: of one dtype and one K.
        columns: of a panel, `Library.panel_columns`.
        interleave: let the panels of the matrices, which are of one shape, alternate.

    Returns:
        Parts that make up the whole, one after the other.
    """
    packed = [_panels(matrix, columns) for matrix in matrices]
    if interleave:
        packed = [np.stack(packed, axis=1)]
    return [panels.view(matrices[0].dtype).reshape(-1) for panels in packed]


def unpack_columns(packed: jax.Array, inputs: int, columns: int, index: jax.Array) -> jax.Array:
    """Some columns of one packed matrix.

    Args:
        packed: as made by `pack` of one matrix `[K, N]`.
        inputs: K.
        columns: of a panel.
        index: int32, any shape; what is out of range gives some column.

    Returns:
        `[*index.shape, K]`.
    """
    unit = _unit(packed.dtype)
    panels = packed.reshape(-1, -(-inputs // unit), columns, unit)
    found = panels.at[index // columns, :, index % columns].get(mode="clip")
    return found.reshape(*index.shape, -1)[..., :inputs]


def pad_columns(rows: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Vectors `[N_i]` one after the other, laid out like the columns of `pack`."""
    return np.concatenate([np.pad(row, (0, -row.shape[0] % columns)) for row in rows])


def _unit(dtype: Any) -> int:
    return 2 if dtype == jnp.bfloat16 else 1


def _panels(matrix: np.ndarray, columns: int) -> np.ndarray:
    """`[panels, units, columns]`, each unit as one number of four bytes."""
    k, n = matrix.shape
    unit = _unit(matrix.dtype)
    if k % unit or n % columns:
        matrix = np.pad(matrix, ((0, -k % unit), (0, -n % columns)))
    words = matrix.view(np.uint32) if unit == 1 else _pairs(matrix.view(np.uint16))
    split = words.reshape(len(words), -1, columns)
    return np.ascontiguousarray(split.transpose(1, 0, 2))


def _pairs(halves: np.ndarray) -> np.ndarray:
    """Each two rows of uint16 as one of uint32, the first in the lower half."""
    words = halves[1::2].astype(np.uint32)
    words <<= np.uint32(16)
    words |= halves[0::2]
    return words
