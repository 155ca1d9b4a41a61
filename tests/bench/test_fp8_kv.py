"""`bench fp8-kv` on a tiny checkpoint: bytes by hand, and distributions that are near."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.bench import fp8_kv
from pshare_jax.bench.distributions import TextsOptions, divergence, perplexity
from pshare_jax.convert.conversions import import_model
from tests.convert.helpers import model_config, random_weights, write_hf_folder


def test_bytes_and_distances(tmp_path):
    config = model_config()
    weights = {name: 4 * value for name, value in random_weights(config).items()}
    import_model(write_hf_folder(tmp_path / "hf", config, weights), tmp_path / "base")
    result = fp8_kv.run(TextsOptions(str(tmp_path / "base"), max_tokens=8))
    wide, small = (result["kv"][name] for name in ("bfloat16", "fp8"))
    assert (wide["bytes"], small["bytes"]) == (2 * 128, 128)
    assert 0 < wide["mean_kl"] < small["mean_kl"] < 0.01
    assert small["perplexity"] == pytest.approx(result["perplexity"], rel=1e-2)
    assert "| fp8 | 128 | " in fp8_kv.lines(result)[4]


def test_distances_of_known_distributions():
    even, uneven = np.zeros((1, 2)), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(divergence(even, uneven), [expected])
    # Two texts of two tokens: the second tokens have a quarter and a half.
    logits = np.concatenate([uneven, even, even, even])
    assert perplexity(logits, [[1, 0], [0, 1]]) == pytest.approx(np.sqrt(4 * 2))
