"""Rotary embeddings; the golden tests compare whole models of each scaling with transformers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.models.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    YarnRopeScaling,
    rope_frequencies,
    scaling_from_json,
    scaling_to_json,
    yarn_attention_factor,
)
from pshare_jax.models.rotation import apply_rope, rope_table


def test_rope_turns_pairs_by_position_times_frequency():
    position, half, size = 7, 8, 16
    x = np.random.default_rng(0).standard_normal((1, 1, 1, size)).astype(np.float32)
    table = rope_table(Rope(100.0), size, jnp.asarray([[position]]))
    rotated = np.asarray(apply_rope(jnp.asarray(x), table))[0, 0, 0]
    for i in range(half):
        pair = complex(x[0, 0, 0, i], x[0, 0, 0, i + half])
        turned = pair * np.exp(1j * position * 100.0 ** (-2 * i / size))
        np.testing.assert_allclose(
            [rotated[i], rotated[i + half]], [turned.real, turned.imag], atol=1e-5
        )


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    scaling = Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    frequencies = rope_frequencies(Rope(5e5, scaling), 128)
    plain = rope_frequencies(Rope(5e5), 128)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    middle = ~short & ~long
    np.testing.assert_array_equal(frequencies[short], plain[short])
    np.testing.assert_allclose(frequencies[long], plain[long] / 8, rtol=1e-6)
    assert short.any()
    assert long.any()
    ratio = plain[middle] / frequencies[middle]
    assert np.all((ratio > 1) & (ratio < 8))
    assert np.all(np.diff(ratio) > 0)


def test_linear_scaling_divides_all_frequencies():
    plain = rope_frequencies(Rope(1e4), 16)
    np.testing.assert_allclose(
        rope_frequencies(Rope(1e4, LinearRopeScaling(4.0)), 16), plain / 4, rtol=1e-6
    )


def test_yarn_keeps_fast_and_divides_slow_components():
    """Qwen2.5's published setting: four times 32768 tokens."""
    rope = Rope(1e6, YarnRopeScaling(4.0, 32768, yarn_attention_factor(4.0)))
    ratio = rope_frequencies(Rope(1e6), 128) / rope_frequencies(rope, 128)
    turns = 32768 * rope_frequencies(Rope(1e6), 128) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 33], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 4.0, rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-6)
    cos, sin = rope_table(rope, 128, jnp.asarray([[1000]]))
    size = 1 + 0.1 * math.log(4)
    np.testing.assert_allclose(cos**2 + sin**2, size**2, rtol=1e-5)


def test_a_part_of_a_head_may_rotate():
    rope = Rope(1e4, LongRopeScaling((1.0, 2.0, 4.0), 1.5, 64), 0.75)
    plain = 1e4 ** -(np.arange(3) / 3)
    frequencies = rope_frequencies(rope, 8)
    np.testing.assert_allclose(frequencies, plain / [1, 2, 4], rtol=1e-6)
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8)).astype(np.float32)
    rotated = np.asarray(apply_rope(jnp.asarray(x), rope_table(rope, 8, jnp.asarray([[5]]))))
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])
    first = complex(x[0, 0, 0, 1], x[0, 0, 0, 4]) * np.exp(5j * frequencies[1]) * 1.5
    np.testing.assert_allclose(rotated[0, 0, 0, [1, 4]], [first.real, first.imag], rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "mscale", "all_dim", "expected"),
    [
        (1.0, None, None, 1.0),
        (4.0, None, None, 1.1386294),
        (4.0, 1.0, None, 1.1386294),
        (40.0, 0.707, 0.707, 1.0),
        (40.0, 1.0, 0.5, 1.3688879 / 1.1844440),
    ],
)
def test_yarn_attention_factors(factor, mscale, all_dim, expected):
    assert yarn_attention_factor(factor, mscale, all_dim) == pytest.approx(expected)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
        LinearRopeScaling(2.0),
        YarnRopeScaling(4.0, 128, 1.2, truncate=False),
        LongRopeScaling((1.0, 2.5), 1.2, 64),
    ],
    ids=["none", "llama3", "linear", "yarn", "longrope"],
)
def test_scalings_come_back_from_json(scaling):
    assert scaling_from_json(scaling_to_json(scaling)) == scaling
