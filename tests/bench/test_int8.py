"""`bench int8` on a tiny checkpoint: bytes by hand, and distributions that are near."""

from __future__ import annotations

import pytest

from pshare_jax.bench import int8
from pshare_jax.convert.conversions import import_model
from tests.convert.helpers import model_config, random_weights, write_hf_folder


def test_bytes_and_distances(tmp_path):
    config = model_config()
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    result = int8.run(int8.Int8Options(str(tmp_path / "base"), max_tokens=8))
    embed, head = 416 * 48, 48 * 416
    kernels = 2 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 64)
    norms = 5 * 48
    outputs = 2 * (64 + 32 + 32 + 48 + 64 + 64 + 48) + 416
    assert result["bfloat16_bytes"] == 2 * (embed + head + kernels + norms)
    assert result["int8_bytes"] == 2 * (embed + norms) + head + kernels + 4 * outputs
    assert 0 < result["mean_kl"] < 1e-3
    assert result["same_best"] > 0.8
    before, after = result["perplexity"]
    assert after == pytest.approx(before, rel=1e-2)
    assert "| int8 | " in int8.lines(result)[3]
