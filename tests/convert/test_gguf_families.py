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
from pshare_jax.models.config import LayerSpec, ModelConfig, with_layers
from pshare_jax.models.rope import LinearRopeScaling, Rope, YarnRopeScaling, yarn_attention_factor
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
ROTATES_PAIRS = ("llama", "mixtral", "smollm3", "granite")


def write_file(
    path: Path, config: ModelConfig, weights: dict[str, np.ndarray], arch: str, **metadata: Any
) -> None:
    """`metadata` has `__` where keys have a dot."""
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
    for native, value in weights.items():
        parts = native.split(".", 2)
        name = f"blk.{parts[1]}.{BLOCK[parts[2]]}" if parts[0] == "layers" else TOP[native]
        if names.has_experts(native, config):
            stored = np.stack([names.to_hf(native, part, config) for part in value])
        else:
            stored = np.ascontiguousarray(names.to_hf(native, value, config))
        if config.norm_adds_one and native.endswith(".scale"):
            stored = stored + 1
        if config.architecture in ROTATES_PAIRS and native.endswith(("q.kernel", "k.kernel")):
            heads = config.num_heads if ".q." in native else config.num_kv_heads
            stored = permute_rope_rows(stored, heads)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored))
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


def test_yarn_as_llama_cpp_computes_it(tmp_path):
    config, arch, metadata = CASES["yarn"]
    write_file(tmp_path / "m.gguf", config, without_biases(config), arch, **metadata)
    assert GGUFFile(tmp_path / "m.gguf").config == config
    stronger = metadata | {"rope__scaling__attn_factor": 0.5, "rope__scaling__yarn_beta_fast": 16.0}
    write_file(tmp_path / "n.gguf", config, without_biases(config), arch, **stronger)
    assert GGUFFile(tmp_path / "n.gguf").config.rope_scaling == YarnRopeScaling(
        4.0, 64, 0.5 * yarn_attention_factor(4.0), 16.0
    )


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
    ],
    ids=["experts", "linear", "yarn", "partial"],
)
def test_what_changes_results_and_is_not_computed_is_named(tmp_path, metadata, words):
    config, arch, _ = CASES["yarn"]
    write_file(tmp_path / "m.gguf", config, without_biases(config), arch, **metadata)
    with pytest.raises(CheckpointError, match=words):
        GGUFFile(tmp_path / "m.gguf")
