"""On a CPU the base's KV in training is the served one, to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.models.decoder import init_weights
from pshare_jax.models.packed import pack_weights
from pshare_jax.runtime.steps import Rows, StepSpec, prefill_chunk
from pshare_jax.train.loss import Recipe, base_kv
from tests.helpers import ARCHITECTURES, tiny_config

LENGTHS, PADDED, PAGE = (13, 20, 7), 20, 4


def served_kv(spec: StepSpec, packed, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """`[tokens, layers, 2, kv_heads, head_dim]`: one sequence, chunk by chunk, into pages."""
    config = spec.config
    count = -(-PADDED // PAGE)  # whatever the sequence takes, so that programs are few
    shape = (count + 1, 2, config.num_kv_heads, PAGE, config.head_dim)
    pages = tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(config.num_layers))
    table = jnp.arange(1, count + 1, dtype=jnp.int32)[None]
    for start in range(0, len(tokens), chunk):
        ids = np.zeros((1, chunk), np.int32)
        part = tokens[start : start + chunk]
        ids[0, : len(part)] = part
        rows = Rows(table, jnp.array([start], jnp.int32), jnp.array([len(part)], jnp.int32))
        pages, _ = prefill_chunk(spec, packed, pages, jnp.asarray(ids), rows)
    kv = np.stack([np.asarray(page, np.float32) for page in pages])[
        :, 1:
    ]  # [layers, count, 2, kv_heads, PAGE, head_dim]
    kv = kv.transpose(1, 4, 0, 2, 3, 5).reshape(count * PAGE, *kv.shape[:1], *kv.shape[2:4], -1)
    return kv[: len(tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_reads_the_kv_that_is_served(architecture):
    config = tiny_config(vocab_size=96, architecture=architecture)
    weights = {name: w.astype(jnp.bfloat16) for name, w in init_weights(config, 0).items()}
    packed = pack_weights(config, weights)
    prompt = np.random.default_rng(0).integers(0, 96, (len(LENGTHS), PADDED), dtype=np.int32)
    compute = jax.jit(base_kv, static_argnums=0)
    kv = compute(Recipe(config, "bfloat16", matmul="cpu_ffi"), packed, jnp.asarray(prompt))
    assert kv.shape == (3, PADDED, config.num_layers, 2, config.num_kv_heads, config.head_dim)
    kv = np.asarray(kv, np.float32)
    spec = StepSpec(config, "cpu_ffi")
    for row, length in enumerate(LENGTHS):
        for chunk in (PADDED, 8):
            served = served_kv(spec, packed, prompt[row, :length], chunk)
            np.testing.assert_array_equal(kv[row, :length], served)
    exact = compute(Recipe(config, "float32"), init_weights(config, 0), jnp.asarray(prompt))
    np.testing.assert_allclose(kv, np.asarray(exact), atol=0.1)
    assert np.abs(kv - exact).mean() < 0.01
    assert np.abs(exact).max() > 0.5
