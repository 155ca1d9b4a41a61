"""The language models of checkpoints that read images too; golden tests compare their logits."""

from __future__ import annotations

import json

import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.models.registry import config_from_hf, language_model
from pshare_jax.models.text_part import text_names
from tests.golden import GOLDEN


def about(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


@pytest.mark.parametrize(
    ("case", "architecture"),
    [("gemma3_vision", "gemma3"), ("mistral3", "mistral"), ("llava", "llama")],
)
def test_the_configuration_is_that_of_the_language_model(case, architecture):
    assert config_from_hf(about(case)).architecture == architecture
    text = language_model(about(case))
    assert "text_config" not in text
    assert config_from_hf(text) == config_from_hf(about(case))


def test_what_the_whole_says_counts_for_the_part():
    hf = about("mistral3")
    assert hf["text_config"]["tie_word_embeddings"] is False
    assert config_from_hf(hf).tie_word_embeddings
    quantised = language_model(hf | {"quantization_config": {"quant_method": "fp8"}})
    assert quantised["quantization_config"] == {"quant_method": "fp8"}


def test_an_unknown_language_model_is_named():
    hf = about("llava")
    hf["text_config"]["model_type"] = "opt"
    with pytest.raises(CheckpointError, match=r"model_type of a Llava.* is 'opt'"):
        config_from_hf(hf)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.a", None),
        ("vision_tower.a", None),
        ("multi_modal_projector.a", None),
        ("something.else", "something.else"),
    ],
)
def test_names(stored, name):
    one_of_text = "language_model.model.embed_tokens.weight"
    assert text_names([stored, one_of_text]).get(stored) == name


def test_a_language_model_alone_keeps_every_name():
    """A tensor that does not belong to it is refused later, not dropped here."""
    names = ["model.norm.weight", "vision_tower.a"]
    assert text_names(names) == {name: name for name in names}
