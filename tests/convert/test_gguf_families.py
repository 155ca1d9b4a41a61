"""GGUF files of every family, with names and conventions of llama.cpp's converter.

The file of Gemma 3 270M was compared as a whole with transformers' reading, see docs/models.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pshare_jax.convert import names
from pshare_jax.convert.gguf import GGUFFile
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import Experts, LayerSpec, ModelConfig, with_layers
from pshare_jax.models.rope import (
    LinearRopeScaling,
    LongRopeScaling,
    Rope,
    YarnRopeScaling,
    yarn_attention_factor,
)
from tests.convert.helpers import permute_rope_rows, random_weights, same_bits
from tests.helpers import tiny_config

TOP = {
    "embed.embedding": "token_embd",
    "final_norm.scale": "output_norm",
    "lm_head.kernel": "output",
}
BLOCK = {
    "attn_norm.scale": "attn_norm",
    "attn.q.kernel": "attn_q",
    "attn.k.kernel": "attn_k",
    "attn.v.kernel": "attn_v",
    "attn.o.kernel": "attn_output",
    "attn.q_norm.scale": "attn_q_norm",
    "attn.k_norm.scale": "attn_k_norm",
    "attn.sinks": "attn_sinks",
    "attn_post_norm.scale": "post_attention_norm",
    "mlp_norm.scale": "ffn_norm",
    "mlp_post_norm.scale": "post_ffw_norm",
    "mlp.gate.kernel": "ffn_gate",
    "mlp.up.kernel": "ffn_up",
    "mlp.down.kernel": "ffn_down",
    "experts.router.kernel": "ffn_gate_inp",
    "experts.gate.kernel": "ffn_gate_exps",
    "experts.up.kernel": "ffn_up_exps",
    "experts.down.kernel": "ffn_down_exps",
}
FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv"}
FUSED |= {"ffn_gate": "ffn_up", "ffn_up": "ffn_up"}
ROTATES_PAIRS = ("llama", "mixtral", "smollm3", "granite")


def name_of(native: str, config: ModelConfig) -> str:
    parts = native.split(".", 2)
    if parts[0] != "layers":
        return f"{TOP[native]}.weight"
    bare, ending = parts[2], "weight"
    if bare.endswith(".bias"):
        bare, ending = bare.replace(".bias", ".kernel"), "bias"
    name = BLOCK[bare]
    if config.architecture == "phi3":
        name = FUSED.get(name, name)
    if config.architecture == "gpt_oss" and name == "ffn_norm":
        name = "post_attention_norm"
    return f"blk.{parts[1]}.{name}.{ending}"


def write_file(
    path: Path,
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    arch: str,
    lists: dict[str, list[float]] | None = None,
    **metadata: Any,
) -> None:
    """`metadata` has `__` where keys have a dot; `lists` are tensors of factors."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        **{key.replace("__", "."): value for key, value in metadata.items()},
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in numbers.items():
        add[type(value)](f"{arch}.{key}", value)
    stored_as: dict[str, list[np.ndarray]] = {}
    for native, value in weights.items():
        if names.has_experts(native, config):
            stored = np.stack([names.to_hf(native, part, config) for part in value])
        else:
            stored = np.ascontiguousarray(names.to_hf(native, value, config))
        if config.norm_adds_one and native.endswith(".scale"):
            stored = stored + 1
        if config.architecture in ROTATES_PAIRS and native.endswith(("q.kernel", "k.kernel")):
            heads = config.num_heads if ".q." in native else config.num_kv_heads
            stored = permute_rope_rows(stored, heads)
        stored_as.setdefault(name_of(native, config), []).append(stored)
    for name, factors in (lists or {}).items():
        stored_as[name] = [np.asarray(factors, np.float32)]
    for name, parts in stored_as.items():
        writer.add_tensor(name, np.ascontiguousarray(np.concatenate(parts)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gemma3_layers() -> tuple[LayerSpec, ...]:
    """Seven, of which the sixth sees everything."""
    sliding, full = LayerSpec(5), LayerSpec(None, Rope(1e6, LinearRopeScaling(8.0)))
    return (*(sliding,) * 5, full, sliding)


EXPERTS = {"expert_count": 4, "expert_used_count": 2}
CASES: dict[str, tuple[ModelConfig, str, dict[str, Any]]] = {
    "gemma": (tiny_config(architecture="gemma"), "gemma", {}),
    "gemma2": (
        tiny_config(architecture="gemma2", query_scale=None),
        "gemma2",
        {
            "attention__sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        tiny_config(architecture="gemma3", query_scale=None, num_layers=7, layers=gemma3_layers()),
        "gemma3",
        {
            "attention__sliding_window": 5,
            "rope__freq_base": 1e6,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
    "mixtral": (tiny_config(architecture="mixtral"), "llama", EXPERTS),
    "qwen3_moe": (
        with_layers(
            tiny_config(architecture="qwen3_moe"),
            [LayerSpec(experts=tiny_config(architecture="mixtral").experts)] * 2,
        ),
        "qwen3moe",
        {**EXPERTS, "expert_feed_forward_length": 64},
    ),
    "smollm3": (
        tiny_config(
            architecture="smollm3",
            num_layers=4,
            layers=(*(LayerSpec(),) * 3, LayerSpec(rope=None)),
        ),
        "smollm3",
        {},
    ),
    "granite": (
        tiny_config(architecture="granite"),
        "granite",
        {
            "attention__scale": 0.2,
            "embedding_scale": 3.0,
            "residual_scale": 0.5,
            "logit_scale": 4.0,
        },
    ),
    "olmo2": (tiny_config(architecture="olmo2"), "olmo2", {}),
    "phi3": (
        tiny_config(architecture="phi3", rope_scaling=None, rope_fraction=0.75),
        "phi3",
        {"attention__sliding_window": 5, "rope__dimension_count": 12},
    ),
    "phi3, longrope": (
        tiny_config(architecture="phi3", max_position_embeddings=64),
        "phi3",
        {
            "attention__sliding_window": 5,
            "rope__dimension_count": 12,
            "context_length": 256,
            "rope__scaling__original_context_length": 64,
            "rope__scaling__attn_factor": 1.2,
            "lists": {
                "rope_factors_short.weight": [1.0, 1.1, 1.5, 2.0, 3.0, 5.0],
                "rope_factors_long.weight": [1.0, 2.1, 2.5, 4.0, 6.0, 9.0],
            },
        },
    ),
    "gpt_oss": (
        with_layers(
            tiny_config(architecture="gpt_oss"),
            [
                LayerSpec(
                    window,
                    Rope(
                        150000.0,
                        YarnRopeScaling(4.0, 64, yarn_attention_factor(4.0), truncate=False),
                    ),
                    Experts(4, 2, 64, biases=True, limit=7.0),
                )
                for window in (5, None)
            ],
        ),
        "gpt-oss",
        {
            **EXPERTS,
            "expert_feed_forward_length": 64,
            "attention__sliding_window": 5,
            "rope__freq_base": 150000.0,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
    ),
    "yarn": (
        tiny_config(
            architecture="qwen2", rope_scaling=YarnRopeScaling(4.0, 64, yarn_attention_factor(4.0))
        ),
        "qwen2",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
    ),
}


def without_biases(config: ModelConfig) -> dict[str, np.ndarray]:
    return random_weights(dataclasses.replace(config, qkv_bias=False))


@pytest.mark.parametrize("case", [case for case in CASES if case != "yarn"])
def test_every_family_comes_back(tmp_path, case):
    config, arch, metadata = CASES[case]
    weights = random_weights(config)
    write_file(tmp_path / "m.gguf", config, weights, arch, **metadata)
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.config == config
    tensors = file.tensors()
    assert set(tensors) == set(weights)
    for name, value in weights.items():
        read = tensors[name].read()
        if config.norm_adds_one and name.endswith(".scale"):
            # 1 + weight was rounded to float32.
            np.testing.assert_allclose(read, value, atol=1e-7)
        else:
            assert same_bits(read, value), name


def test_one_of_longropes_lists_is_chosen(tmp_path):
    config, arch, metadata = CASES["phi3, longrope"]
    write_file(tmp_path / "m.gguf", config, random_weights(config), arch, **metadata)
    long = GGUFFile(tmp_path / "m.gguf", long_context=True).config
    factors = (1.0, 2.1, 2.5, 4.0, 6.0, 9.0)
    assert long.rope_scaling == LongRopeScaling(factors, 1.2, 64)
    assert long.max_position_embeddings == 256
    lists = {k: v for k, v in metadata["lists"].items() if "long" in k}
    weights = random_weights(config)
    write_file(tmp_path / "n.gguf", config, weights, arch, **{**metadata, "lists": lists})
    with pytest.raises(CheckpointError, match=r"rope_factors_short\.weight is missing"):
        GGUFFile(tmp_path / "n.gguf")
    lists = {name: factors[:-1] for name, factors in metadata["lists"].items()}
    write_file(tmp_path / "o.gguf", config, weights, arch, **{**metadata, "lists": lists})
    with pytest.raises(CheckpointError, match=r"has shape \[5\], but 6 components"):
        GGUFFile(tmp_path / "o.gguf")


def test_a_fused_tensor_of_another_size_is_named(tmp_path):
    config, arch, metadata = CASES["phi3"]
    other = dataclasses.replace(config, num_kv_heads=4)
    fewer = {**metadata, "attention__head_count_kv": 2}
    write_file(tmp_path / "m.gguf", other, random_weights(other), arch, **fewer)
    with pytest.raises(CheckpointError, match=r"attn_qkv\.weight has shape \[192, 48\]"):
        GGUFFile(tmp_path / "m.gguf").tensors()


def test_yarn_as_llama_cpp_computes_it(tmp_path):
    config, arch, metadata = CASES["yarn"]
    write_file(tmp_path / "m.gguf", config, without_biases(config), arch, **metadata)
    assert GGUFFile(tmp_path / "m.gguf").config == config
    stronger = metadata | {"rope__scaling__attn_factor": 0.5, "rope__scaling__yarn_beta_fast": 16.0}
    write_file(tmp_path / "n.gguf", config, without_biases(config), arch, **stronger)
    assert GGUFFile(tmp_path / "n.gguf").config.rope_scaling == YarnRopeScaling(
        4.0, 64, 0.5 * yarn_attention_factor(4.0), 16.0
    )


def test_what_changes_nothing_is_passed_over(tmp_path):
    config, arch, _ = CASES["yarn"]
    neutral = {"attention__scale": 0.0, "logit_scale": 1.0, "expert_shared_count": 0}
    write_file(tmp_path / "m.gguf", config, without_biases(config), arch, **neutral)
    assert GGUFFile(tmp_path / "m.gguf").config.rope_scaling is None


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"expert_count": 4}, "mixture of experts is not supported"),
        ({"rope__scale_linear": 2.0}, "rope.scale_linear is not supported"),
        (
            CASES["yarn"][2] | {"rope__scaling__yarn_ext_factor": 0.5},
            "yarn_ext_factor is not supported",
        ),
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8; only the head size 16"),
        ({"attention__scale": 0.5}, "attention.scale is 0.5, which is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which is not"),
        ({"expert_gating_func": 2}, "expert_gating_func is 2, which is not supported"),
    ],
    ids=["experts", "linear", "yarn", "partial", "scale", "cap", "gating"],
)
def test_what_changes_results_and_is_not_computed_is_named(tmp_path, metadata, words):
    config, arch, _ = CASES["yarn"]
    write_file(tmp_path / "m.gguf", config, without_biases(config), arch, **metadata)
    with pytest.raises(CheckpointError, match=words):
        GGUFFile(tmp_path / "m.gguf")
