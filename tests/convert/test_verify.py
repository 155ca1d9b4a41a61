"""`verify`: logit differences and KL against a plain computation."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.convert import verify
from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.convert.verify import Model, compare, load_model, read_prompts
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.decoder import bind
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft

CONFIG = model_config()
PROMPTS = ("hello world", "the quick brown fox, naïve 🙂", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    weights = random_weights(CONFIG)
    root = tmp_path_factory.mktemp("verify")
    write_hf_folder(root / "hf", CONFIG, weights)
    import_model(root / "hf", root / "base")
    make_decoder(root / "base", root / "copy")
    write_peft(root / "peft", factors_for("q", "down"))
    make_decoder(root / "base", root / "lora", lora=root / "peft")
    return root


def changed(model: Model, scale: float) -> Model:
    weights = dict(model.weights)
    weights["lm_head.kernel"] = weights["lm_head.kernel"] * scale
    return dataclasses.replace(model, weights=weights)


def logits_of(model: Model, tokens: list[int]) -> np.ndarray:
    decoder = bind(CONFIG, model.weights)
    positions = jnp.arange(len(tokens))[None]
    hidden = decoder.hidden(jnp.asarray([tokens]), positions, CausalAttention(CONFIG))
    return np.asarray(decoder.logits(hidden)[0], np.float64)


def test_a_model_equals_itself_in_every_form(folder):
    base = load_model(folder / "base")
    for other in (load_model(folder / "hf"), load_model(folder / "copy", folder / "base")):
        difference = compare(base, other, PROMPTS)
        assert difference.largest == 0
        assert difference.mean_kl == 0
        assert difference.positions > 10


def test_the_numbers_are_those_of_a_plain_computation(folder):
    a = load_model(folder / "base")
    b = changed(a, 30.0)
    tokenizer = Tokenizer.load(folder / "base" / "tokenizer")
    largest, kl = [], []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        x, y = logits_of(a, tokens), logits_of(b, tokens)
        largest.append(np.abs(x - y).max())
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        q = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
        kl += list((p * np.log(p / q)).sum(-1))
    difference = compare(a, b, PROMPTS)
    assert difference.largest == pytest.approx(max(largest), rel=1e-4)
    assert difference.mean_kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert difference.positions == len(kl)
    assert difference.largest > 0.1


def test_a_lora_module_is_merged_into_its_base(folder):
    base, module = load_model(folder / "base"), load_model(folder / "lora", folder / "base")
    factors = factors_for("q", "down")
    name = "layers.1.mlp.down"
    update = 8 / 4 * factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]
    np.testing.assert_allclose(
        module.weights[f"{name}.kernel"], base.weights[f"{name}.kernel"] + update, atol=1e-6
    )
    difference = compare(base, module, PROMPTS)
    assert difference.largest > 1e-5
    assert difference.mean_kl > 0


def test_nan_is_a_difference(folder):
    base = load_model(folder / "base")
    difference = compare(base, changed(base, float("nan")), PROMPTS)
    assert np.isnan(difference.largest)
    assert not difference.largest <= 1.0


def test_long_prompts_are_cut(folder, monkeypatch):
    monkeypatch.setattr(verify, "MAX_TOKENS", 5)
    base = load_model(folder / "base")
    assert compare(base, base, ["hello world " * 50, "hello " * 60]).positions == 10


def test_what_cannot_be_compared_is_explained(folder, tmp_path):
    base = load_model(folder / "base")
    other = dataclasses.replace(base, config=model_config(vocab_size=500))
    with pytest.raises(CheckpointError, match="vocabularies of 416 and 500 tokens"):
        compare(base, other)
    bare = dataclasses.replace(base, tokenizer_files={})
    with pytest.raises(CheckpointError, match="neither model has a tokenizer"):
        compare(bare, bare)
    with pytest.raises(CheckpointError, match="is a LoRA module; name its base with --base"):
        load_model(folder / "lora")
    import_model(
        write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG, seed=9)), tmp_path / "other"
    )
    with pytest.raises(CertificateError, match="is not the base"):
        load_model(folder / "copy", tmp_path / "other")


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two\n")
    assert read_prompts(path) == ["one", "  two"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(CheckpointError, match="has no prompts"):
        read_prompts(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_prompts(tmp_path / "none")
