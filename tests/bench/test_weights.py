"""`bench weights` on a tiny checkpoint: bytes by hand, memory, distributions that are near."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pshare_jax.bench import weights, weights_memory
from pshare_jax.bench.weights import WeightsOptions
from pshare_jax.convert.conversions import import_model
from pshare_jax.errors import BenchmarkError
from tests.convert.helpers import model_config, random_weights, write_hf_folder


def test_bytes_and_distances(tmp_path, monkeypatch):
    config = model_config()
    base = str(tmp_path / "base")
    import_model(write_hf_folder(tmp_path / "hf", config, random_weights(config)), base)
    made = []
    monkeypatch.setattr(
        weights_memory, "_in_a_process", lambda *of: made.append(of) or len(made) * 10**6
    )
    result = weights.run(WeightsOptions(base, max_tokens=8))
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
    rows = [[cell.strip() for cell in line.split("|")] for line in weights.lines(result)[2:]]
    assert [row[1] for row in rows] == ["bfloat16", *weights.FORMS]
    # Three processes for each form, the forms in turn.
    assert made == [(base, form) for form in ("plain", *weights.FORMS)] * 3
    assert result["int8"]["memory"] == [2 * 10**6, 6 * 10**6, 10 * 10**6]
    assert [row[3] for row in rows] == ["5 (1 - 9)", "6 (2 - 10)", "7 (3 - 11)", "8 (4 - 12)"]


def test_memory_of_an_engine_in_a_process_of_its_own(tmp_path):
    config = model_config()
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    found = weights_memory.grown_by(str(tmp_path / "base"), ["int8-dynamic"], 1)
    assert list(found) == ["int8-dynamic"]
    (grown,) = found["int8-dynamic"]
    # Both pools lie in it: 9 pages of 64 tokens, keys and values of 2 layers, 2 heads of 16.
    assert grown > 2 * 9 * 64 * (2 * 2 * 2 * 16) * 2


def test_a_tied_embedding_has_8_bits_where_activations_have(tmp_path):
    config = model_config(tie_word_embeddings=True)
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    result = weights.run(WeightsOptions(str(tmp_path / "base"), max_tokens=8, processes=0))
    assert [weights.lines(result)[row].split("|")[3].strip() for row in (2, 3, 4, 5)] == [""] * 4
    assert result["int8"]["bytes"] - result["int8-dynamic"]["bytes"] == 416 * 48 - 4 * 416
    assert 0 < result["int8-dynamic"]["mean_kl"] < 3e-3


def test_a_base_that_has_8_bits_already_is_refused(tmp_path, monkeypatch):
    folder = write_hf_folder(tmp_path / "hf", model_config(), random_weights(model_config()))
    manifest = replace(import_model(folder, tmp_path / "base"), weights="fp8")
    monkeypatch.setattr(weights, "open_checkpoint", lambda base: manifest)
    with pytest.raises(BenchmarkError, match=r"weights are fp8 already; .* with --dequantise"):
        weights.run(WeightsOptions(str(tmp_path / "base")))
