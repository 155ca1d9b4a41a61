"""Steps of families whose layers differ or have experts compile for accelerators, in place."""

from dataclasses import replace

import pytest

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program
from pshare_jax.bench.compile_programs import Sizes, step_programs
from pshare_jax.models.config import Experts, LayerSpec, ModelConfig, with_layers
from pshare_jax.models.rope import LinearRopeScaling, Rope

GEMMA_3_12B = ModelConfig(
    architecture="gemma3",
    vocab_size=262208,
    hidden_size=3840,
    intermediate_size=15360,
    num_layers=48,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    rms_norm_eps=1e-6,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    qk_norm=True,
    layers=(*(LayerSpec(1024),) * 5, LayerSpec(None, Rope(1e6, LinearRopeScaling(8.0)))) * 8,
    activation="gelu_tanh",
    norm_adds_one=True,
    norms="both",
    embedding_scale=3840**0.5,
)
GEMMA_2_9B = with_layers(
    replace(
        GEMMA_3_12B,
        architecture="gemma2",
        hidden_size=3584,
        intermediate_size=14336,
        num_layers=42,
        qk_norm=False,
        layers=(LayerSpec(),) * 42,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        embedding_scale=3584**0.5,
    ),
    [LayerSpec(4096), LayerSpec()] * 21,
)

QWEN3_30B_A3B = ModelConfig(
    architecture="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    qk_norm=True,
    experts=Experts(128, 8, 768),
)
PARTS = {
    "gemma3": replace(GEMMA_3_12B, num_layers=2, layers=GEMMA_3_12B.layers[4:6]),
    "gemma2": replace(GEMMA_2_9B, num_layers=2, layers=GEMMA_2_9B.layers[:2]),
    "qwen3_moe": replace(QWEN3_30B_A3B, num_layers=2),
}
"""A layer of each kind, which are compiled beside the memory that the others take."""
STEPS = ("prefill chunk", "decode step")


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["v6e:2x4", "h100"])
@pytest.mark.parametrize(
    "config", [GEMMA_3_12B, GEMMA_2_9B, QWEN3_30B_A3B], ids=lambda config: config.architecture
)
def test_steps_compile_and_keep_the_pool_in_place(name, config):
    accelerator = ACCELERATORS[name]
    part, sizes = PARTS[config.architecture], Sizes(batch=8, context=4096)
    programs = step_programs(accelerator, config, sizes, part)
    compiled = {
        program.name: compile_program(accelerator, program, config.num_layers)
        for program in programs
        if program.name in STEPS
    }
    assert set(compiled) == set(STEPS)
    for step, result in compiled.items():
        assert result.pool_in_place, step
        assert result.total_bytes < accelerator.memory, step
