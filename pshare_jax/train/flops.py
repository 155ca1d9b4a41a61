"""How much arithmetic a step asks for, and how much the machine can do."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pshare_jax.kernels.matmul.api import matmul
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import used_parameters
from pshare_jax.train.layout import Row
from pshare_jax.train.loss import Recipe


def _forward(config: ModelConfig, positions: Iterable[int], targets: int) -> float:
    """Operations of a forward pass over tokens at `positions` with logits for `targets` of them."""
    tokens = context = 0
    for position in positions:
        tokens += 1
        context += position + 1
    attention = 4 * config.num_heads * config.head_dim * context
    head = 2 * config.hidden_size * config.vocab_size * targets
    return 2 * used_parameters(config) * tokens + config.num_layers * attention + head


def row_flops(recipe: Recipe, row: Row, *, kv_kept: bool) -> float:
    """Multiplications and additions that training on one row once needs, padding left out.

    A backward pass counts as two forward passes, or as one when the weights below LoRA factors get
    no gradient; recomputation (`remat`) does not count.

    Args:
        recipe: what is trained.
        row: the tokens.
        kv_kept: whether the prefill module's KV need not be computed.
    """
    backward = 1 if recipe.lora else 2
    total = (1 + backward) * _forward(recipe.config, row.positions.tolist(), len(row.targets))
    if not kv_kept:
        total += _forward(recipe.config, range(len(row.prompt)), 0)
    if recipe.teacher is not None:
        total += _forward(recipe.teacher, range(len(row.sequence)), len(row.targets))
    return total


def measure_peak(dtype: str, backend: str) -> float:
    """Operations a second of one device on a large matrix product: the best of a few.

    Args:
        dtype: of the matrices.
        backend: of the decoder's products, see `kernels/matmul`; another may be slower than they.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(functools.partial(matmul, backend=backend))
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
