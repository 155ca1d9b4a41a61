"""Rule 2 for families whose layers differ, have experts, or are left to XLA by the C++ layers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig, ServeConfig
from pshare_jax.engine.devices import compute_dtype
from pshare_jax.models.config import ModelConfig
from tests.engine.harness import Models, lora_module, running, serve_config
from tests.helpers import tiny_config
from tests.pairwise import some


def with_degree(prefill: int, decode: int) -> ServeConfig:
    return serve_config(
        prefill=PrefillConfig(tensor_parallel=prefill, chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(
            tensor_parallel=decode,
            batch_buckets=[4],
            max_num_seqs=8,
            replay_buckets=[4],
            num_pages=40,
        ),
    )


def config_of(architecture: str) -> ModelConfig:
    """Of two layers, which differ if the family's do."""
    config = tiny_config(architecture=architecture)
    return dataclasses.replace(config, num_layers=2, layers=config.layers[-2:])


DEGREES = {
    "gemma2": (1, 1),
    "gemma3": (1, 2),
    "qwen3_moe": (2, 4),
    "olmo2": (2, 1),
    "mixtral": (1, 1),
    "gpt_oss": (2, 1),
}
CHOSEN = [
    ("gemma2", "full"),
    ("gemma3", "lora"),
    ("qwen3_moe", "full"),
    ("olmo2", "full"),
    ("mixtral", "lora"),
    ("gpt_oss", "both"),
]


@pytest.mark.parametrize(
    ("architecture", "kind"), some(itertools.product(DEGREES, ("full", "lora", "both")), CHOSEN)
)
def test_greedy_tokens_are_the_oracles(architecture: str, kind: str) -> None:
    models = Models(config_of(architecture))
    models.add_identity("identity")
    if kind != "lora":
        models.add_full("full", 1, tail=2)
    if kind != "full":
        models.add_lora("lora", lora_module(models.config, 3, rank=2, targets=("q", "v")))
    contexts = np.random.default_rng(0).integers(0, 256, (2, 41)).tolist()
    prompts = [tuple(context[:n]) for context in contexts for n in (1, 9, 24, 41)]
    with running(models, with_degree(*DEGREES[architecture])) as client:
        asked = [(name, prompt) for prompt in prompts for name in models.tails]
        replies = [client.submit(name, prompt, 5) for name, prompt in asked]
        for reply in replies:
            reply.wait(120)
        client.check_idle()
    for (name, prompt), reply in zip(asked, replies, strict=True):
        assert reply.tokens == models.expected(name, prompt, 5), (name, len(prompt))


def test_a_family_that_xla_computes_is_served_in_float32_on_a_cpu() -> None:
    """bfloat16 products are slow there, but in C++."""
    config = serve_config(dtype="auto")
    assert compute_dtype(config, tiny_config(architecture="qwen3_moe")) == "float32"
    assert compute_dtype(config, tiny_config(architecture="gemma3")) == "bfloat16"
