"""The C++ kernels in an engine: bfloat16, and a machine that cannot have them."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig, ServeConfig, WeightFormat
from pshare_jax.engine.orchestrator import compute_dtype
from pshare_jax.kernels.native import library
from pshare_jax.models.quantise import in_format
from pshare_jax.models.weights import SCALE, Weights
from tests.engine.harness import Models, lora_module, running, serve_config
from tests.helpers import tiny_config


def half(weights: Weights) -> Weights:
    """In bfloat16, but for what has 8 bits, and its scales."""
    narrow = {name for name, weight in weights.items() if weight.dtype.itemsize == 1}
    kept = narrow | {name + SCALE for name in narrow}
    return {n: w if n in kept else w.astype(jnp.bfloat16) for n, w in weights.items()}


@pytest.mark.parametrize("form", ["plain", "int8", "int8-dynamic", "fp8"])
def test_bfloat16_answers_depend_on_nothing_but_the_request(form: WeightFormat) -> None:
    """Shared, isolated, in other chunks and batches, beside other models, after cache hits: the
    same tokens."""
    plain = Models(tiny_config(architecture="qwen3", tie_word_embeddings=form == "int8-dynamic"))
    module = lora_module(plain.config, 3, rank=3, targets=("q", "down"))
    plain.add_lora("lora", module._replace(weights=half(module.weights)))
    models = Models(in_format(plain.config, form))
    models.base = half(models.base)
    models.add_identity("shared")
    models.add_identity("isolated", isolated=True)
    models.sources += plain.sources
    models.tails["lora"] = 1
    contexts = np.random.default_rng(0).integers(0, 256, (3, 50)).tolist()
    prompts = [tuple(c[:n]) for c in contexts for n in (1, 9, 33, 50)]
    configs: list[ServeConfig] = [
        serve_config(dtype="bfloat16"),
        serve_config(
            dtype="bfloat16",
            page_size=16,
            prefill=PrefillConfig(chunk_buckets=[32], num_pages=40),
            decode=DecodeConfig(batch_buckets=[8], max_num_seqs=8, replay_buckets=[4]),
        ),
    ]
    answers: dict[str, list[list[list[int]]]] = {}
    for config in configs:
        with running(models, config) as client:
            for name in models.tails:
                together = [client.submit(name, prompt, 12) for prompt in prompts]
                answers.setdefault(name, []).append([reply.wait().tokens for reply in together])
                alone = [client.generate(name, prompt, 12).tokens for prompt in prompts[:4]]
                assert alone == answers[name][-1][:4]
            # The base and the LoRA module in one batch.
            mixed = [
                (n, i, client.submit(n, p, 12))
                for i, p in enumerate(prompts[:4])
                for n in models.tails
            ]
            for name, i, reply in mixed:
                assert reply.wait().tokens == answers[name][-1][i], (name, i)
    for name in models.tails:
        assert answers[name][0] == answers[name][1], name
    assert answers["shared"] == answers["isolated"]
    assert answers["shared"] != answers["lora"]


def test_without_a_compiler_xla_serves_the_oracles_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_load", functools.cache(library._load.__wrapped__))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    models = Models(tiny_config())
    models.add_full("full", 1, tail=2)
    models.add_lora("lora", lora_module(models.config, 3, rank=2, targets=("q", "v")))
    assert compute_dtype(serve_config(dtype="auto")) == "float32"
    # Few programs: XLA's take long to compile.
    config = serve_config(
        prefill=PrefillConfig(chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28),
    )
    with caplog.at_level(logging.WARNING, "pshare_jax"), running(models, config) as client:
        for name in models.tails:
            prompt = tuple(range(20))
            assert client.generate(name, prompt).tokens == models.expected(name, prompt), name
    assert len([line for line in caplog.messages if "CPU kernels" in line]) <= 1


def test_the_dtype_of_a_cpu_goes_by_what_it_can() -> None:
    assert compute_dtype(serve_config()) == "float32"
    assert compute_dtype(serve_config(dtype="auto", kernel_backend="xla")) == "float32"
    on_a_mesh = serve_config(dtype="auto", decode=DecodeConfig(tensor_parallel=2))
    assert compute_dtype(on_a_mesh) == "float32"
    assert compute_dtype(serve_config(dtype="auto")) == "bfloat16"
