from __future__ import annotations

import json
import math

import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import config_from_json, config_to_json
from pshare_jax.models.family import uses_long_factors
from pshare_jax.models.fingerprint import prefill_fingerprint
from pshare_jax.models.hf_fields import with_long_factors
from pshare_jax.models.registry import config_from_hf, config_to_hf
from pshare_jax.models.rope import Llama3RopeScaling, LongRopeScaling
from tests.golden import CASES, GOLDEN
from tests.helpers import ARCHITECTURES, tiny_config

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 64,
}


def config_of(name: str, **fields):
    return config_from_hf(MINIMAL | {"architectures": [name]} | fields)


@pytest.mark.parametrize(
    "config",
    [
        *(tiny_config(architecture=name) for name in ARCHITECTURES),
        *(tiny_config(architecture=name, sliding_window=12) for name in ("qwen2", "qwen3")),
        tiny_config(architecture="mistral", sliding_window=None),
    ],
    ids=lambda config: f"{config.architecture}-{config.sliding_window}",
)
def test_round_trip(config):
    text = json.dumps(config_to_hf(config))
    assert config_from_hf(json.loads(text)) == config


@pytest.mark.parametrize("case", CASES)
def test_golden_configs_survive_a_round_trip(case):
    config = config_from_hf(json.loads((GOLDEN / f"{case}.json").read_text()))
    assert config_from_hf(config_to_hf(config)) == config


def test_fields_of_transformers_4_and_5_mean_the_same():
    old = config_of(
        "LlamaForCausalLM", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}
    )
    new = config_of(
        "LlamaForCausalLM",
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)


def test_absent_fields_have_the_architectures_defaults():
    llama = config_of("LlamaForCausalLM")
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
    assert (llama.rope_theta, llama.rope_scaling, llama.tie_word_embeddings) == (1e4, None, False)
    assert llama.max_position_embeddings == 2048
    mistral = config_of("MistralForCausalLM", num_attention_heads=8)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)
    qwen2 = config_of("Qwen2ForCausalLM", num_key_value_heads=None)
    assert (qwen2.num_kv_heads, qwen2.qkv_bias, qwen2.qk_norm) == (4, True, False)
    qwen3 = config_of("Qwen3ForCausalLM", num_key_value_heads=2)
    assert (qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm) == (128, False, True)


def test_longrope_goes_by_the_list_that_is_asked_for():
    hf = {
        **MINIMAL,
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": 0.25,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_scaling": LONGROPE | {"original_max_position_embeddings": 99},
    }
    short, long = config_from_hf(hf), config_from_hf(with_long_factors(hf))
    assert short.rope_fraction == long.rope_fraction == 0.25
    factor = math.sqrt(1 + math.log(32) / math.log(4096))
    assert short.rope_scaling == LongRopeScaling((1.0, 1.5), pytest.approx(factor), 4096)
    assert long.rope_scaling == LongRopeScaling((2.0, 3.0), pytest.approx(factor), 4096)
    assert (short.max_position_embeddings, long.max_position_embeddings) == (4096, 131072)
    assert (uses_long_factors(short), uses_long_factors(long)) == (False, True)
    for config in (short, long):
        assert config_from_hf(config_to_hf(config)) == config
        assert config_from_json(config_to_json(config)) == config
    assert prefill_fingerprint(short, {}, "t") != prefill_fingerprint(long, {}, "t")


def test_sliding_windows():
    cases = [
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("MistralForCausalLM", {"sliding_window": 16}, 16),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": False}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": True}, None),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            16,
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 4,
            },
            16,
        ),
    ]
    for name, fields, expected in cases:
        assert config_of(name, num_key_value_heads=4, **fields).sliding_window == expected, fields


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["MistralForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["GemmaForCausalLM"], "hidden_act": "silu"}, "hidden_act is 'silu'"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type is 'mrope'; supported are"),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}},
            "rope_scaling.short_factor is missing",
        ),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1, 0]}}, "long_factor is .*must hold pos"),
        ({"rope_scaling": LONGROPE}, "longrope has 2 factors, but 8 components rotate"),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.2},
            "partial_rotary_factor is 0.2: 3 of a head's 16 components",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.rope_type is 'linear'; of Phi-3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": -1.0}}, "rope_scaling.factor is -1.0"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.factor is missing",
        ),
        ({"rope_parameters": "default"}, "rope_parameters"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
            | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types has 'chunked_attention'",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
            | {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
            "layer_types .* must name all 4 layers",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_unsupported_configs_are_refused_by_field(fields, named):
    with pytest.raises(CheckpointError, match=named):
        config_from_hf(MINIMAL | fields)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (tiny_config(architecture="llama", sliding_window=8), "sliding_window"),
        (tiny_config(architecture="mistral", qkv_bias=True), "qkv_bias"),
        (tiny_config(architecture="qwen2", qk_norm=True), "qk_norm"),
    ],
    ids=["window", "bias", "qk_norm"],
)
def test_what_an_architecture_cannot_express_is_not_exported(config, field):
    with pytest.raises(CheckpointError, match=f"{field}="):
        config_to_hf(config)
