"""The models whose steps `bench compile` compiles: their architectures, without weights."""

from __future__ import annotations

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.rope import Llama3RopeScaling

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
}
