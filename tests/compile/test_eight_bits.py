"""Steps over weights of 8 bits compile for accelerators, and no copy of them in another form."""

from dataclasses import replace

import pytest

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.compile_programs import Sizes, step_programs
from pshare_jax.models.quantise import in_format

STEPS = ("prefill chunk", "decode step")
LAYERS = 4


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["v6e:2x4", "h100"])
def test_weights_stay_in_8_bits(name, form):
    accelerator, sizes = ACCELERATORS[name], Sizes(batch=8)
    plain = replace(MODELS["Llama-3.1-8B"], num_layers=LAYERS)
    configs = {each: in_format(plain, each) for each in ("plain", form)}
    programs = {
        each: {program.name: program for program in step_programs(accelerator, config, sizes)}
        for each, config in configs.items()
    }
    for step in STEPS:
        program = programs[form][step]
        # Embeddings are not quantised.
        assert program.weight_bytes < 0.75 * programs["plain"][step].weight_bytes
        result = compile_program(accelerator, program, LAYERS)
        assert result.pool_in_place, step
        assert result.total_bytes < accelerator.memory, step
        # A layer's kernels in bfloat16 are a quarter of these bytes and more.
        assert result.temp_bytes < program.weight_bytes / LAYERS, step
