"""The C++ layers with weights of 8 bits, rounding what they multiply or not, against XLA."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.kernels.decoder_layer.packing import unpack_columns
from pshare_jax.kernels.native.library import require_library
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.packed import PackedDecoder, pack_adapters, pack_weights, unsupported
from pshare_jax.models.quantise import in_format
from pshare_jax.models.weights import LORA_TARGETS
from tests.helpers import stacked, tiny_config
from tests.models.test_packed import (
    CONFIGS,
    LENS,
    START,
    assert_same_as_xla,
    batch,
    in_cpp,
    in_cpp_and_kv_only,
    in_xla,
    random_lora,
    written,
)
from tests.pairwise import some

TOLERANCE = {"float32": 5e-3, "bfloat16": 4e-2}
"""Relative error. What is rounded to the nearest on one side may go the other way on the other,
where both have it a little differently."""

# Biases; norms of heads; norms after blocks, windows and caps; norms that add one; multipliers.
NAMES = ("qwen2", "qwen3", "gemma2", "gemma3", "granite", "odd sizes")
CASES = [*((name, "bfloat16") for name in NAMES), ("odd sizes", "float32")]
FORMS: tuple[WeightFormat, ...] = ("int8", "int8-dynamic", "fp8")
PACKED = {"int8": jnp.uint8, "fp8": jnp.float8_e4m3fn}
"""What panels are made of, by form; neither rounds what it multiplies."""


def dynamic(name: str) -> ModelConfig:
    return in_format(CONFIGS[name], "int8-dynamic")


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_same_numbers_as_xla(name, dtype):
    config = dynamic(name)
    weights, index = init_weights(config, 1, jnp.dtype(dtype)), np.zeros(4, np.int32)
    inputs, packed = batch(config, dtype), pack_weights(config, weights)
    assert packed["layers"].matrices.dtype == packed["head"].dtype == jnp.uint8
    expected, expected_pages = in_xla(config, weights, None, index, *inputs)
    logits, best, pages, kv_only = in_cpp_and_kv_only(config, packed, None, index, *inputs)
    valid, table = np.flatnonzero(LENS), inputs[2][0]
    ends = np.asarray(expected)[valid, LENS[valid] - 1]
    assert error(logits[valid], ends) < TOLERANCE[dtype]
    assert error(written(pages, table), written(expected_pages, table)) < TOLERANCE[dtype]
    np.testing.assert_array_equal(written(pages, table), written(kv_only, table))
    np.testing.assert_array_equal(best, np.asarray(logits).argmax(axis=-1))


@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    some(
        itertools.product(NAMES, TOLERANCE, PACKED),
        [*((*case, "int8") for case in CASES), *((*case, "fp8") for case in CASES[-2:])],
    ),
)
def test_same_numbers_as_xla_where_nothing_else_is_rounded(name, dtype, form):
    assert_same_as_xla(in_format(CONFIGS[name], form), dtype)


def test_the_numbers_are_not_those_of_plain_weights():
    config, index = CONFIGS["odd sizes"], np.zeros(4, np.int32)
    inputs, valid = batch(config, "float32"), np.flatnonzero(LENS)
    rounded, exact = (
        np.asarray(in_xla(of, init_weights(of, 1), None, index, *inputs)[0])[valid, LENS[valid] - 1]
        for of in (dynamic("odd sizes"), config)
    )
    assert error(rounded, exact) > 5e-3


def test_adapters_of_unlike_shape_in_one_batch():
    config = dynamic("odd sizes")
    modules = [
        random_lora(config, 3, LORA_TARGETS, 6.0, 1, "bfloat16"),
        random_lora(config, 16, ("q", "v"), 2.0, 2, "bfloat16"),
        random_lora(config, 40, ("o", "gate", "down"), 20.0, 3, "bfloat16"),
    ]
    weights, inputs = init_weights(config, 1, jnp.bfloat16), batch(config, "bfloat16")
    adapters = stacked(modules)
    index = np.asarray([2, 0, 1, -1], np.int32)
    expected, expected_pages = in_xla(config, weights, adapters, index, *inputs)
    packed = pack_weights(config, weights), pack_adapters(config, adapters)
    logits, _, pages = in_cpp(config, *packed, index, *inputs)
    valid, table = np.flatnonzero(LENS), inputs[2][0]
    ends = np.asarray(expected)[valid, LENS[valid] - 1]
    assert error(logits[valid], ends) < TOLERANCE["bfloat16"]
    assert error(written(pages, table), written(expected_pages, table)) < TOLERANCE["bfloat16"]
    # Rows of the base are those without adapters, to the bit.
    alone = in_cpp(config, packed[0], None, np.zeros(4, np.int32), *inputs)[0]
    np.testing.assert_array_equal(logits[3], alone[3])


@pytest.mark.parametrize("form", PACKED)
def test_a_plain_head_over_layers_of_8_bits(form):
    config = in_format(CONFIGS["llama"], f"{form}-layers")
    assert not config.tie_word_embeddings
    packed = pack_weights(config, init_weights(config, 1, jnp.bfloat16))
    assert (packed["layers"].matrices.dtype, packed["head"].dtype) == (PACKED[form], jnp.bfloat16)
    assert_same_as_xla(config, "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "form"), [("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "fp8")]
)
def test_adapters_where_nothing_else_is_rounded(dtype, form):
    config = in_format(CONFIGS["odd sizes"], form)
    modules = [
        random_lora(config, 3, LORA_TARGETS, 6.0, 1, dtype),
        random_lora(config, 40, ("o", "gate", "down"), 20.0, 3, dtype),
    ]
    assert_same_as_xla(config, dtype, modules, (1, -1, 0, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_depends_on_nothing_beside_it(dtype, form):
    """To the bit: alone, in a batch, in one chunk or token by token, of the base or adapted."""
    config = in_format(CONFIGS["qwen3"], form)
    weights = pack_weights(config, init_weights(config, 1, jnp.dtype(dtype)))
    modules = [random_lora(config, r, LORA_TARGETS, 4.0, r, dtype) for r in (2, 5)]
    adapters = pack_adapters(config, stacked(modules))
    for first in (1, -1):
        index = np.asarray([first, 0, 0, -1], np.int32)
        tokens, positions, rows, pages = batch(config, dtype)
        logits, _, after = in_cpp(config, weights, adapters, index, tokens, positions, rows, pages)
        alone = pages
        for i in range(LENS[0]):
            one = (rows[0][:1], START[:1] + i, np.ones(1, np.int32))
            token, position = tokens[:1, i : i + 1], positions[:1, i : i + 1]
            out, best, alone = in_cpp(
                config, weights, adapters, index[:1], token, position, one, alone
            )
        np.testing.assert_array_equal(out[0], logits[0])
        assert best[0] == np.asarray(logits[0]).argmax()
        for whole, single in zip(after, alone, strict=True):
            own = rows[0][0]
            np.testing.assert_array_equal(
                np.asarray(whole, np.float32)[own], np.asarray(single, np.float32)[own]
            )


HEADS = [("int8-dynamic", False), ("int8-dynamic", True), ("int8", False), ("fp8", False)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("form", "tied"), HEADS)
def test_a_head_of_8_bits(form, tied, dtype):
    """The choice under a mask, and a tied embedding looked up in the head."""
    plain = tiny_config(hidden_size=51, vocab_size=131, tie_word_embeddings=tied)
    config = in_format(plain, form)
    weights = init_weights(config, 1, jnp.dtype(dtype))
    packed = pack_weights(config, weights)
    assert ("embed.embedding" in packed) is not tied
    decoder, rng = PackedDecoder(config, packed), np.random.default_rng(0)
    x = rng.standard_normal((3, 51)).astype(np.float32)
    may = rng.random((3, 160)) < 0.1
    mask = np.packbits(may, axis=1, bitorder="little").view(np.uint32)
    logits, best = decoder.logits(x, np.ones(3, np.int32), jnp.asarray(True), mask)
    allowed = np.where(may[:, :131], logits, -np.inf)
    np.testing.assert_array_equal(best, allowed.argmax(axis=1))
    if form in PACKED:
        # NumPy's, which needs no program for each shape.
        wide = {name: np.asarray(weights[name]).astype(np.float32) for name in weights}
        normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.rms_norm_eps)
        read = (normed * wide["final_norm.scale"]).astype(jnp.dtype(dtype)).astype(np.float32)
        expected = read @ wide["lm_head.kernel"] * wide["lm_head.kernel_scale"]
        # One input of bfloat16 may be rounded the other way.
        assert error(logits, expected) < (1e-6 if dtype == "float32" else 2e-3)
    if tied:
        tokens = jnp.asarray([[0, 130, 31], [32, 64, 7]], jnp.int32)
        columns = require_library().panel_columns
        found = unpack_columns(packed["head"], 51, columns, tokens)
        np.testing.assert_array_equal(found, weights["embed.embedding"][tokens])
        values = found * weights["embed.embedding_scale"][tokens][..., None]
        np.testing.assert_array_equal(decoder._embed(tokens), values)


def test_bytes_of_another_model_are_refused():
    config, other = dynamic("llama"), in_format(tiny_config(intermediate_size=96), "int8-dynamic")
    weights, index = pack_weights(config, init_weights(config, 1)), np.zeros(4, np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="packed weights are of another model"):
        jax.block_until_ready(in_cpp(other, weights, None, index, *batch(other, "float32")))
    cut = weights | {"head_scales": weights["head_scales"][:-1]}
    with pytest.raises(jax.errors.JaxRuntimeError, match="packed head is of another model"):
        jax.block_until_ready(in_cpp(config, cut, None, index, *batch(config, "float32")))


def test_a_tied_embedding_is_the_head_in_the_dtype_of_the_others():
    plain = tiny_config(hidden_size=51, vocab_size=131, tie_word_embeddings=True)
    config = in_format(plain, "int8")
    packed = pack_weights(config, init_weights(config, 1, jnp.bfloat16))
    assert unsupported(config) is None
    assert packed["layers"].matrices.dtype == jnp.uint8
    assert packed["head"].dtype == jnp.bfloat16
    assert "head_scales" not in packed
