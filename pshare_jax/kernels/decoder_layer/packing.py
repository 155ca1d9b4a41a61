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


@dataclass(frozen=True)
class Parts:
    """What every layer of a decoder has besides its projections; `locate` reads the same.

    Args:
        pre_norms: whether blocks' inputs are normalised.
        bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised.
        norm_all_heads: whether they are over all heads together.
        post_norms: whether blocks' outputs are normalised.
        o_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the projections of a dense feed-forward block have biases.
        sinks: whether heads have attention sinks.
        experts: how many there are; 0 for a dense feed-forward block.
        experts_per_token: how many of them a token takes.
        experts_normalised: whether their weights are divided by their sum.
        expert_biases: whether the router and the experts have biases.
        experts_limit: of gpt-oss's gate; 0 for SiLU.
    """

    pre_norms: bool = True
    bias: bool = False
    qk_norm: bool = False
    norm_all_heads: bool = False
    post_norms: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    experts: int = 0
    experts_per_token: int = 0
    experts_normalised: bool = False
    expert_biases: bool = False
    experts_limit: float = 0.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "matrices"],
    meta_fields=["parts", "computed", "rounds"],
)
@dataclass(frozen=True)
class PackedLayers:
    """The weights of all layers.

    Args:
        vectors: `[layers, m]` float32, of those that `parts` says are there: scales of the two
            norms; qkv's bias; scales of the norms of q and k; of the norms after both blocks;
            sinks; biases of o, of gate and up with alternating panels, of down; of the router, of
            all experts' gate and up, of their down. Biases are padded like their columns. Last, of
            matrices of 8 bits, the scales of their columns, laid out as these.
        matrices: `[layers, n]` float32, bfloat16, float8_e4m3fn, or uint8 for whole numbers plus
            128: packed qkv, o, gate and up with alternating panels, and down; with experts after o
            the router, gate and up of each expert, and down of each.
        parts: what layers have.
        computed: name of the dtype that is computed in, where weights and pages do not say.
        rounds: whether what matrices of 8 bits multiply is rounded to 8 bits as well.
    """

    vectors: jax.Array
    matrices: jax.Array
    parts: Parts
    computed: str
    rounds: bool = False


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


def alternate_columns(first: np.ndarray, second: np.ndarray, columns: int) -> np.ndarray:
    """Two vectors `[N]` laid out like the columns of matrices that `pack_into` interleaves."""
    pair = [
        np.pad(row, (0, -row.shape[0] % columns)).reshape(-1, columns) for row in (first, second)
    ]
    return np.stack(pair, axis=1).reshape(-1)
