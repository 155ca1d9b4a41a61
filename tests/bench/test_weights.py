"""`bench weights` on a tiny checkpoint: bytes by hand, and distributions that are near."""

from __future__ import annotations

import pytest

from pshare_jax.bench import weights
from pshare_jax.bench.distributions import TextsOptions
from pshare_jax.convert.conversions import import_model
from tests.convert.helpers import model_config, random_weights, write_hf_folder


def test_bytes_and_distances(tmp_path):
    config = model_config()
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    result = weights.run(TextsOptions(str(tmp_path / "base"), max_tokens=8))
    embed, head = 416 * 48, 48 * 416
    kernels = 2 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 64)
    norms = 5 * 48
    outputs = 2 * (64 + 32 + 32 + 48 + 64 + 64 + 48) + 416
    assert result["plain"]["bytes"] == 2 * (embed + head + kernels + norms)
    for form, most in (("int8", 1e-3), ("int8-dynamic", 3e-3), ("fp8", 1e-2)):
        found = result[form]
        assert found["bytes"] == 2 * (embed + norms) + head + kernels + 4 * outputs
        assert 0 < found["mean_kl"] < most
        assert found["same_best"] > 0.8
        assert found["perplexity"] == pytest.approx(result["plain"]["perplexity"], rel=1e-2)
    assert result["int8-dynamic"]["mean_kl"] > result["int8"]["mean_kl"]
    assert [line.split(" ")[1] for line in weights.lines(result)[2:]] == [
        "bfloat16",
        *weights.FORMS,
    ]


def test_a_tied_embedding_has_8_bits_where_activations_have(tmp_path):
    config = model_config(tie_word_embeddings=True)
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    result = weights.run(TextsOptions(str(tmp_path / "base"), max_tokens=8))
    assert result["int8"]["bytes"] - result["int8-dynamic"]["bytes"] == 416 * 48 - 4 * 416
    assert 0 < result["int8-dynamic"]["mean_kl"] < 3e-3
