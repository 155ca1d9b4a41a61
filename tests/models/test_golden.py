"""Logits against transformers', on the tiny checkpoints that `tests/golden/make_golden.py` made."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pshare_jax.convert import names
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.models.hf_fields import with_long_factors
from pshare_jax.models.registry import config_from_hf
from pshare_jax.models.text_part import text_names
from pshare_jax.models.weights import Weights, weight_specs
from tests.golden import CASES, GOLDEN
from tests.helpers import FAMILIES, on_device


def config_of(case):
    hf = json.loads((GOLDEN / f"{case}.json").read_text())
    return config_from_hf(with_long_factors(hf) if case == "phi3_long" else hf)


@functools.cache
def loaded(case) -> tuple[ModelConfig, Weights, jax.Array, np.ndarray]:
    """Configuration, weights, tokens `[1, 32]` and transformers' logits."""
    config = config_of(case)
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    expected = tensors.pop("golden.logits")
    tokens = jnp.asarray(tensors.pop("golden.input_ids"), jnp.int32)
    tensors = {name: tensors[stored] for stored, name in text_names(tensors).items()}
    assert set(tensors) == set(names.hf_tensors(config))
    weights = {
        native: on_device(names.read_native(native, config, tensors.__getitem__))
        for native in weight_specs(config)
    }
    return config, weights, tokens, expected


@functools.partial(jax.jit, static_argnums=0)
def forward(config, weights, tokens):
    decoder = bind(config, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.logits(decoder.hidden(tokens, positions, CausalAttention(config)))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    config, weights, tokens, expected = loaded(case)
    np.testing.assert_allclose(forward(config, weights, tokens), expected, rtol=0, atol=1e-4)


def test_the_cases_differ_where_they_should():
    """The golden files exercise what they are there for."""
    configs = {case: config_of(case) for case in CASES}
    tokens = load_file(GOLDEN / "mistral.safetensors")["golden.input_ids"].shape[1]
    assert {config.architecture for config in configs.values()} == set(FAMILIES)
    short, long = configs["phi3_short"], configs["phi3_long"]
    assert short.rope_fraction == long.rope_fraction == 0.75
    assert short.max_position_embeddings == 64
    assert long.max_position_embeddings == 512
    assert long.rope_scaling.original_max_position_embeddings < tokens
    assert long.rope_scaling.factors == (1.0, 2.5, 9.0)
    for case in ("gemma2", "gemma3", "qwen2_windows", "phi3"):
        windows = [spec.sliding_window for spec in configs[case].layer_specs]
        assert min(window for window in windows if window) < tokens
        assert (None in windows) == (case != "phi3")
    assert len({spec.rope for spec in configs["gemma3"].layer_specs}) == 2
    assert [spec.rope is None for spec in configs["smollm3"].layer_specs] == [False, True]
    assert [spec.experts is None for spec in configs["qwen3_moe"].layer_specs] == [0, 1, 0]
    assert configs["yarn"].rope_scaling.rope_type == "yarn"
    assert configs["llama3"].rope_scaling is not None
    assert not configs["llama3"].tie_word_embeddings
    assert configs["llama_tied"].tie_word_embeddings
    assert configs["mistral"].sliding_window is not None
    assert configs["mistral"].sliding_window < tokens
    assert configs["qwen2"].qkv_bias
    assert configs["qwen3"].qk_norm
    assert configs["qwen3"].head_dim != configs["qwen3"].hidden_size // configs["qwen3"].num_heads
