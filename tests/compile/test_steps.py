"""Whole steps of the real models compile, fit, and leave the KV pool where it is."""

from dataclasses import replace

import pytest

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.compile_programs import Sizes, one_chip_programs, step_programs
from pshare_jax.models.config import ModelConfig

# Tensor parallelism over four, two and one devices, and the model that fills the smallest of them.
CASES = [
    ("v5e:2x4", "Qwen3-14B"),
    ("v5p:2x2x1", "Qwen3-8B"),
    ("v6e:2x4", "Llama-3.1-8B"),
    ("tpu7x:2x2x1", "Llama-3.1-8B"),
    ("h100", "Llama-3.1-8B"),
]
SHARED_STEP = "decode step, one shared context"
CHOICE = "choice of masked tokens"
STEPS = ("prefill chunk", "handoff: gather", "handoff: scatter", "decode step", SHARED_STEP, CHOICE)
LAYERS = 3
"""Of 32 to 40, which are alike: they are compiled beside the memory that the others take."""


def part_of(config: ModelConfig) -> ModelConfig:
    return replace(config, num_layers=LAYERS)


@pytest.mark.compile
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "model"), CASES)
def test_steps_compile_fit_and_keep_the_pool_in_place(name, model):
    accelerator, config, sizes = ACCELERATORS[name], MODELS[model], Sizes()
    compiled = {
        program.name: compile_program(accelerator, program, config.num_layers)
        for program in step_programs(accelerator, config, sizes, part_of(config))
    }
    assert tuple(compiled) == STEPS
    # What it takes beside the logits is a few copies of the device's part of them, and where they
    # are split, all of them, which the limits of sampling look at on each device; libtpu 0.0.50
    # keeps two of these.
    choice = compiled.pop(CHOICE)
    gathered = sizes.batch * config.vocab_size * 4
    assert choice.temp_bytes < 8 * choice.least_bytes + 2 * gathered
    for step, result in compiled.items():
        assert result.pool_in_place, step
        assert result.temp_bytes < result.pool_bytes / config.num_layers, step
        assert result.total_bytes < accelerator.memory, step
    if accelerator.platform == "tpu":
        decode = compiled["decode step"]
        assert decode.least_bytes < decode.hbm_bytes < 1.3 * decode.least_bytes
    # The decode mesh holds its whole batch at full context beside the weights.
    assert compiled["decode step"].largest_pool_tokens > sizes.batch * sizes.context / 2


@pytest.mark.compile
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "sequences"), [("v6e:2x4", 20), ("h100", 100)])
def test_one_chip_serves_an_8b_base_with_lora_modules(name, sequences):
    """One pool and one set of weights: the pool still holds so many sequences at full context. For
    the GPU all layers are compiled, which takes a TPU's compiler minutes."""
    accelerator, config, sizes = ACCELERATORS[name], MODELS["Llama-3.1-8B"], Sizes()
    part = None if accelerator.platform == "cuda" else part_of(config)
    compiled = {
        program.name: compile_program(accelerator, program, config.num_layers)
        for program in one_chip_programs(accelerator, config, sizes, part)
    }
    assert tuple(compiled) == ("prefill chunk", "decode step", SHARED_STEP, CHOICE)
    del compiled[CHOICE]
    for step, result in compiled.items():
        assert result.pool_in_place, step
        assert result.total_bytes < accelerator.memory, step
        assert result.largest_pool_tokens > sequences * sizes.context, step


@pytest.mark.compile
def test_an_8b_base_in_bfloat16_is_larger_than_a_v5e_chip():
    accelerator, config = ACCELERATORS["v5e:2x4"], MODELS["Llama-3.1-8B"]
    chunk = next(one_chip_programs(accelerator, config, Sizes()))
    # With the adapters 15.3 GiB of 15.75: a decode step leaves a pool of 2,900 tokens.
    assert chunk.weight_bytes > 0.95 * accelerator.memory
