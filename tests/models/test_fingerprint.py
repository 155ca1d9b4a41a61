"""Names of KV: what they depend on, and digests that may never change."""

from __future__ import annotations

import dataclasses

import pytest

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.fingerprint import former_fingerprints, prefill_fingerprint
from pshare_jax.models.rope import Llama3RopeScaling

HASHES = {"embed.embedding": "aa", "final_norm.scale": "bb"}
PLAIN = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
LLAMA_31 = dataclasses.replace(
    PLAIN,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
)
QWEN3 = dataclasses.replace(
    PLAIN, architecture="qwen3", qk_norm=True, rms_norm_eps=1e-6, sliding_window=512
)


@pytest.mark.parametrize(
    ("config", "digest", "version_1"),
    [
        (
            PLAIN,
            "1a2296dd3abd140561a7e8cb4aab8ca5a4139e1ff2564d157b4b37a2fbc0b745",
            "98d17a601a1e97460188ca53176052ecd6ff3ab33bfea87a613e9ce54c6c7af1",
        ),
        (
            SMOLLM2_135M,
            "dd8aac1947ff95cb80e1c641c8388f6d9cbf0f47c27ab6a90769b86b5c9145b6",
            "0e6fb4d4dd5d44f4887f0f825ca2f4e5fdf47cfb0594da4937a45afbc58214b5",
        ),
        (
            LLAMA_31,
            "82a76791749001ca947c9804cf29626cbd4c143c7db63a8752fe1fd9d6f2d169",
            "ea73caca015b347a6318a112e390f0877e0bc51565fbb79f15b2f34659362d54",
        ),
        (
            QWEN3,
            "3ea3e5e26e64d34540e00e7dda331d298977ee2368608ee5759ce09c85085f27",
            "6c542573e34b0d45b62789285107f60e482c53e02e0c70f38460935555f3a87f",
        ),
    ],
    ids=["plain", "smollm2-135m", "llama-3.1", "qwen3"],
)
def test_the_digests(config, digest, version_1):
    """Certificates state them: a change of one is a change of the version, see `fingerprint`."""
    assert prefill_fingerprint(config, HASHES, "tokenizer") == digest
    assert former_fingerprints(config, HASHES, "tokenizer") == (version_1,)


def test_it_depends_on_everything_that_the_kv_depends_on():
    fingerprint = prefill_fingerprint(PLAIN, HASHES, "tokenizer")
    others = [
        prefill_fingerprint(
            PLAIN, {"embed.embedding": "bb", "final_norm.scale": "aa"}, "tokenizer"
        ),
        prefill_fingerprint(PLAIN, HASHES, "another tokenizer"),
        *(
            prefill_fingerprint(dataclasses.replace(PLAIN, **change), HASHES, "tokenizer")
            for change in (
                {"architecture": "mistral"},
                {"rope_theta": 5e5},
                {"rms_norm_eps": 1e-6},
                {"qkv_bias": True},
                {"qk_norm": True},
                {"sliding_window": 64},
                {"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 8192)},
                {"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 4096)},
            )
        ),
    ]
    assert len({fingerprint, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "same",
    [
        dataclasses.replace(PLAIN, max_position_embeddings=77),
        dataclasses.replace(PLAIN, rope_theta=10000),
        dataclasses.replace(PLAIN, rope_theta=1e4, sliding_window=None),
    ],
    ids=["longest context", "an integer", "defaults"],
)
def test_it_depends_on_nothing_else(same):
    expected = prefill_fingerprint(PLAIN, HASHES, "tokenizer")
    reordered = dict(reversed(HASHES.items()))
    assert prefill_fingerprint(same, reordered, "tokenizer") == expected


def test_equal_numbers_are_written_alike():
    configs = [dataclasses.replace(PLAIN, rope_theta=theta) for theta in (500000, 5e5)]
    assert len({prefill_fingerprint(config, HASHES, "t") for config in configs}) == 1


@dataclasses.dataclass(frozen=True)
class Grown(ModelConfig):
    """A configuration of a later version."""

    soft_cap: float | None = None


def test_a_new_field_with_its_default_changes_no_fingerprint():
    grown = Grown(**vars(LLAMA_31))
    expected = prefill_fingerprint(LLAMA_31, HASHES, "tokenizer")
    assert prefill_fingerprint(grown, HASHES, "tokenizer") == expected
    before = former_fingerprints(LLAMA_31, HASHES, "tokenizer")
    assert former_fingerprints(grown, HASHES, "tokenizer") == before
    capped = dataclasses.replace(grown, soft_cap=30.0)
    assert prefill_fingerprint(capped, HASHES, "tokenizer") != expected
    assert former_fingerprints(capped, HASHES, "tokenizer") == ()
