"""Every family: over pages as without them, in C++ or not, and one that somebody else brings."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.models import registry
from pshare_jax.models.blocks.layer import DecoderLayer
from pshare_jax.models.config import (
    LayerSpec,
    ModelConfig,
    config_from_json,
    config_to_json,
    with_layers,
)
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.family import Family
from pshare_jax.models.fingerprint import prefill_fingerprint
from pshare_jax.models.packed import is_packed, unsupported
from pshare_jax.models.rope import LinearRopeScaling, Rope, YarnRopeScaling
from pshare_jax.models.weights import check_weights
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.steps import PagedAttention, Rows, StepSpec
from tests.helpers import FAMILIES, tiny_config
from tests.models.test_golden import forward, loaded

PAGE, TOKENS, SPLIT = 4, 32, 19


@functools.partial(jax.jit, static_argnums=0)
def in_two_chunks(spec, weights, tokens):
    """The first positions by `write_kv`, as a prefill module does, then the rest."""
    layout = PageLayout.of(spec.config, PAGE, jnp.float32)
    pages = [jnp.full(layout.layer_shape(10), jnp.nan) for _ in range(layout.num_layers)]
    table = jnp.asarray([[3, 1, 7, 5, 2, 8, 4, 6]], jnp.int32)

    def rows(start, count):
        return Rows(table, *(jnp.full(1, n, jnp.int32) for n in (start, count)))

    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
    decoder = spec.bind(weights)
    prefill = PagedAttention(spec, tuple(pages), rows(0, SPLIT))
    decoder.write_kv(tokens[:, :SPLIT], positions[:, :SPLIT], prefill)
    decode = PagedAttention(spec, tuple(prefill.pages), rows(SPLIT, TOKENS - SPLIT))
    return decoder.logits(decoder.hidden(tokens[:, SPLIT:], positions[:, SPLIT:], decode))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_pages_give_the_same_logits(architecture):
    """Those of one pass without pages, which test_golden.py compares with transformers'."""
    config, weights, tokens, _ = loaded("llama3" if architecture == "llama" else architecture)
    assert config.architecture == architecture
    expected = forward(config, weights, tokens)[:, SPLIT:]
    actual = in_two_chunks(StepSpec(config, "xla"), weights, tokens)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.std(expected) > 0.1


def test_all_families_are_known():
    assert set(registry.architectures()) == set(FAMILIES)
    assert {family.name for family in registry.families()} == set(FAMILIES)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_configurations_come_back_from_json(architecture):
    config = tiny_config(architecture=architecture)
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [
        ("gemma3", None),
        ("smollm3", None),
        ("granite", None),
        ("mixtral", None),
        ("gpt_oss", None),
        ("olmo2", None),
        ("qwen3_moe", "experts in some layers only"),
        ("phi3", None),
        ("llama", None),
    ],
)
def test_what_the_cpp_layers_leave_to_xla(architecture, problem):
    config = tiny_config(architecture=architecture)
    assert unsupported(config) == problem
    assert is_packed("cpu_ffi", config) == (problem is None)
    assert not is_packed("xla", config)


class TestLayers:
    """Layers that differ have one form, and a name of their own."""

    PLAIN = tiny_config(architecture="qwen2")

    def test_layers_that_are_alike_are_said_once(self):
        specs = [LayerSpec(7, Rope(5e5, LinearRopeScaling(2.0)))] * 2
        config = with_layers(self.PLAIN, specs)
        assert config.layers == ()
        assert (config.sliding_window, config.rope_theta) == (7, 5e5)
        assert list(config.layer_specs) == specs
        assert with_layers(config, [LayerSpec()] * 2) == self.PLAIN

    def test_what_is_said_twice_is_refused(self):
        specs = (LayerSpec(7), LayerSpec())
        with pytest.raises(ValueError, match="sliding_window is set, although layers"):
            dataclasses.replace(self.PLAIN, layers=specs, sliding_window=7)
        with pytest.raises(ValueError, match="layers describes 1 of 2 layers"):
            dataclasses.replace(self.PLAIN, layers=specs[:1])

    def test_fingerprints_tell_layers_and_scalings_apart(self):
        configs = [
            self.PLAIN,
            *(
                with_layers(self.PLAIN, layers)
                for layers in (
                    [LayerSpec(7), LayerSpec()],
                    [LayerSpec(), LayerSpec(7)],
                    [LayerSpec(), LayerSpec(rope=None)],
                    [LayerSpec(), LayerSpec(rope=Rope(5e5))],
                    [LayerSpec(rope=Rope(1e4, LinearRopeScaling(2.0)))] * 2,
                    [LayerSpec(rope=Rope(1e4, YarnRopeScaling(2.0, 64, 1.0)))] * 2,
                )
            ),
        ]
        names = {prefill_fingerprint(config, {}, "tokenizer") for config in configs}
        assert len(names) == len(configs)


class HalvedLayer(DecoderLayer):
    """A layer that no other family has: what it gives counts half."""

    def __call__(self, x, ropes, attention, adapters):
        return (x + super().__call__(x, ropes, attention, adapters)) / 2


class Halved(Family):
    name = "halved"
    hf_architectures = ("HalvedForCausalLM",)
    model_type = "halved"
    decoder_layer = HalvedLayer


HALVED = Halved()


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelConfig]:
    """A configuration of a family in somebody else's package."""
    point = importlib.metadata.EntryPoint("halved", f"{__name__}:HALVED", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "_entry_points", lambda: [point])
    yield dataclasses.replace(tiny_config(rope_scaling=None), architecture="halved")
    registry.family.cache_clear()


def test_a_family_is_found_by_its_entry_point(halved):
    hf = registry.config_to_hf(halved)
    assert hf["architectures"] == ["HalvedForCausalLM"]
    read = registry.config_from_hf(hf)
    assert read == halved
    weights = init_weights(halved, seed=0)
    check_weights(halved, weights)
    tokens = jnp.asarray([[5, 6, 7]])
    plain = forward(dataclasses.replace(halved, architecture="llama"), weights, tokens)
    own = forward(halved, weights, tokens)
    assert float(jnp.abs(own - plain).max()) > 0.1
    assert unsupported(halved) == "layers of its own"


def test_without_its_entry_point_it_is_not_known():
    config = dataclasses.replace(tiny_config(), architecture="halved")
    with pytest.raises(CheckpointError, match="architecture 'halved' is not known; known are"):
        init_weights(config, seed=0)
