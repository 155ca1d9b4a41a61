"""The engine on Pallas kernels, in the interpreter: greedy tokens are the oracle's."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig
from tests.engine.harness import Models, running, serve_config
from tests.helpers import tiny_config


@pytest.mark.parametrize("backend", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_same_tokens_as_the_oracle_on_unequal_meshes(backend: str) -> None:
    models = Models(tiny_config(architecture="qwen3"))
    models.add_identity("identity")
    models.add_full("full", 1, tail=2)
    config = serve_config(
        kernel_backend=backend,
        # Few pages a row: the TPU kernel's copies of a block's pages are unrolled.
        page_size=64,
        prefill=PrefillConfig(tensor_parallel=2, chunk_buckets=[64], num_pages=12),
        decode=DecodeConfig(
            tensor_parallel=4,
            batch_buckets=[2],
            max_num_seqs=4,
            replay_buckets=[4],
            num_pages=12,
            shared_prefix="on",
        ),
    )
    context = np.random.default_rng(0).integers(0, 256, 70).tolist()
    with running(models, config) as client:
        asked = [name for name in models.tails for _ in range(2)]
        replies = [client.submit(name, tuple(context), 4) for name in asked]
        for reply in replies:
            reply.wait(120)
        stats = client.engine.stats()
    assert stats.decode_pages["decode0", "saved"] > 0
    for name, reply in zip(asked, replies, strict=True):
        assert reply.tokens == models.expected(name, context, 4), name
