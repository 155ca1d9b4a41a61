"""The models whose steps `bench compile` compiles: their architectures, without weights."""

from __future__ import annotations

from pshare_jax.models.config import Experts, LayerSpec, ModelConfig
from pshare_jax.models.rope import (
    Llama3RopeScaling,
    Rope,
    YarnRopeScaling,
    yarn_attention_factor,
)


def _gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    rope = Rope(150000.0, YarnRopeScaling(32.0, 4096, yarn_attention_factor(32.0), truncate=False))
    experts = Experts(num_experts, 4, 2880, biases=True, limit=7.0)
    return ModelConfig(
        architecture="gpt_oss",
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        qkv_bias=True,
        o_bias=True,
        attention_sinks=True,
        layers=tuple(LayerSpec(None if i % 2 else 128, rope, experts) for i in range(num_layers)),
    )


MODELS = {
    "Llama-3.1-8B": ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    ),
    "Qwen3-8B": ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        qk_norm=True,
    ),
    "Qwen3-14B": ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=17408,
        num_layers=40,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        qk_norm=True,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
}
