"""Training computations compile with weights, moments and batch split over a whole machine."""

from dataclasses import replace

import pytest

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.compile_programs import Sizes, bytes_per_device
from pshare_jax.bench.training_programs import training_programs

SMALL = replace(
    MODELS["Llama-3.1-8B"],
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
)


@pytest.mark.compile
def test_training_steps_compile_and_update_in_place():
    accelerator = ACCELERATORS["v5e:2x4"]
    sizes = Sizes(train_prompt=256, train_answer=64)
    for program in training_programs(accelerator, SMALL, sizes):
        compiled = compile_program(accelerator, program, SMALL.num_layers)
        assert compiled.total_bytes < accelerator.memory
        if program.name.endswith("update"):
            # Masters and moments are overwritten: the result takes no memory of its own.
            taken = compiled.total_bytes - compiled.temp_bytes - program.resident_bytes
            assert taken < 1.3 * bytes_per_device(program.arguments)
