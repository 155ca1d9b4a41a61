"""Decoding that reads shared pages once: the oracle's tokens, and no surprises besides."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig, SharedPrefix
from pshare_jax.models.config import ModelConfig
from pshare_jax.runtime.decode_inputs import DecodeInputs
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.steps import StepSpec
from tests.engine.harness import MAX_LEN, PAGE, Models, lora_module, running, serve_config
from tests.helpers import tiny_config

CONFIGS = {
    "full attention": tiny_config(architecture="qwen3"),
    "sliding window": tiny_config(architecture="mistral", sliding_window=29),
}


def modules(config: ModelConfig) -> Models:
    """Modules that share a batch, and without a window, one with a batch of its own."""
    models = Models(config)
    models.add_identity("identity")
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    models.add_lora("lora-tail5", lora_module(config, 4, rank=4, targets=("k",)), tail=5)
    if config.sliding_window is None:
        models.add_full("full", 1, tail=2)
    return models


ENGINE = serve_config(
    kernel_backend="xla",
    prefill=PrefillConfig(chunk_buckets=[16], num_pages=40),
    decode=DecodeConfig(
        batch_buckets=[8],
        max_num_seqs=12,
        replay_buckets=[4],
        num_pages=40,
        steps_per_dispatch=4,
        shared_prefix="on",
    ),
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_same_tokens_as_the_oracle(config: ModelConfig) -> None:
    models, rng = modules(config), np.random.default_rng(0)
    contexts = rng.integers(0, 256, (2, 45)).tolist()
    # Equal prompts, prompts that branch off at and between page borders, two contexts.
    branches = [contexts[0][:cut] + contexts[1][-cut % 7 :] for cut in (17, 24, 40)]
    prompts = [(p, 9) for p in (contexts[0], contexts[1][:33], *branches)]
    # More long answers than the pool holds.
    prompts += [(contexts[0][: 20 + i], 80) for i in range(2)]
    with running(models, ENGINE) as client:
        asked = [(name, *prompt) for prompt in prompts for name in models.tails]
        replies = [client.submit(*request) for request in asked]
        for reply in replies:
            reply.wait(120)
        client.check_idle()
        stats = client.engine.stats()
    for request, reply in zip(asked, replies, strict=True):
        assert reply.tokens == models.expected(*request), request
    assert stats.decode_pages["decode0", "saved"] > 40
    assert sum(stats.preemptions.values()) > 0
    assert stats.compiles == 0


@pytest.mark.parametrize(
    ("setting", "backend", "executables"),
    [
        ("auto", "xla", 1),
        ("auto", "pallas_tpu", 2),
        ("auto", "pallas_gpu", 2),
        ("off", "pallas_tpu", 1),
        ("on", "xla", 2),
        ("on", "reference", 1),
        ("on", "cpu_ffi", 1),
    ],
)
def test_the_setting_and_the_backend_decide(
    setting: SharedPrefix, backend: str, executables: int
) -> None:
    model = tiny_config()
    layout = PageLayout.of(model, PAGE, np.float32)
    inputs = DecodeInputs(8, layout, MAX_LEN, StepSpec(model, backend), setting)
    warmed = list(inputs.warm_up(8))
    assert len(warmed) == executables
    assert [step.runs is not None for step in warmed] == [False, True][:executables]
    assert len(list(inputs.warm_up(1))) == 1
