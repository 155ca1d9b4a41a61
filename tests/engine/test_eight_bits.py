"""Weights of 8 bits in the engine: the oracle's tokens, from KV with a name of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig, WeightFormat
from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.engine.devices import compute_dtype
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.engine.sources import checkpoint_sources, model_specs
from pshare_jax.errors import ConfigError
from pshare_jax.models.lora import merge
from pshare_jax.models.packed import pack_weights
from pshare_jax.models.quantise import in_format, quantise
from pshare_jax.models.weights import lora_specs, weight_specs
from pshare_jax.sharding.mesh import carve_one
from pshare_jax.sharding.rules import replicated, weight_shardings
from tests.convert.helpers import model_config, random_weights, same_bits, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft
from tests.engine.harness import Models, lora_module, running, serve_config
from tests.helpers import tiny_config
from tests.models.test_quantise import dequantised


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_greedy_tokens_are_the_oracles(form: WeightFormat) -> None:
    config = in_format(tiny_config(architecture="qwen3"), form)
    models = Models(config)
    models.add_identity("identity")
    models.add_full("full", 1, tail=2)
    # The oracle of an adapted model is a merged one, of plain weights with the same values.
    plain = Models(config.with_weights("plain"))
    plain.base = dequantised(models.base)
    module = lora_module(config, 3, rank=2, targets=("q", "v", "down"))
    plain.add_lora("lora", module)
    models.sources.append(plain.sources[-1])
    context = np.random.default_rng(0).integers(0, 256, 41).tolist()
    prompts = [tuple(context[:n]) for n in (1, 9, 24, 41)]
    sides: dict[str, Any] = {
        "prefill": PrefillConfig(chunk_buckets=[16], num_pages=40),
        "decode": DecodeConfig(
            tensor_parallel=2,
            batch_buckets=[4],
            max_num_seqs=8,
            replay_buckets=[4],
            num_pages=40,
        ),
    }
    with running(models, serve_config(**sides)) as client:
        names = ("identity", "full", "lora")
        asked = [(name, prompt) for prompt in prompts for name in names]
        replies = [client.submit(name, prompt, 5) for name, prompt in asked]
        for reply in replies:
            reply.wait(120)
        client.check_idle()
    for (name, prompt), reply in zip(asked, replies, strict=True):
        oracle = plain if name == "lora" else models
        assert reply.tokens == oracle.expected(name, prompt, 5), (name, len(prompt))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    config = model_config()
    import_model(write_hf_folder(folder / "hf", config, random_weights(config)), folder / "base")
    make_decoder(folder / "base", folder / "full")
    lora = write_peft(folder / "peft", factors_for("q"))
    make_decoder(folder / "base", folder / "lora", lora=lora, tail=1, cache_conditioned=True)
    return folder


def configured(folder, **entries: Any) -> ServeConfig:
    models = [ModelEntry("full", str(folder / "full")), ModelEntry("base", "identity")]
    models.append(ModelEntry("lora", str(folder / "lora"), **entries))
    return ServeConfig(base=str(folder / "base"), models=models, weights="int8")


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_checkpoints_are_quantised_when_they_are_loaded(served, form) -> None:
    config = dataclasses.replace(configured(served), weights=form)
    base, sources = checkpoint_sources(config, "float32")
    assert base.config.weight_format == form
    mesh = carve_one(jax.devices(), 1, 1)[0]
    weights = base.load(weight_shardings(mesh, weight_specs(base.config)))
    expected = quantise(base.config, random_weights(model_config()))
    assert set(weights) == set(expected)
    assert all(same_bits(weights[name], expected[name]) for name in expected)
    full = sources[0].load(weight_shardings(mesh, weight_specs(base.config)))
    assert all(same_bits(full[name], expected[name]) for name in expected)
    plain, _ = checkpoint_sources(
        dataclasses.replace(configured(served), weights="plain"), "float32"
    )
    specs = model_specs(base, sources, 1)
    assert {spec.namespace for spec in specs.values()} == {f"{plain.fingerprint}/{form}"}
    assert plain.kv_name == plain.fingerprint == base.fingerprint


FORMS = [("int8", "xla"), ("int8", "cpu_ffi"), ("int8-dynamic", "cpu_ffi"), ("fp8", "cpu_ffi")]


@pytest.mark.parametrize(("form", "backend"), FORMS)
def test_an_isolated_lora_is_merged_before_it_is_quantised(served, form, backend) -> None:
    config = dataclasses.replace(configured(served, sharing="isolated"), weights=form)
    base, sources = checkpoint_sources(config, "float32")
    mesh = carve_one(jax.devices(), 1, 1)[0]
    loaded = WeightLoader(base, sources, backend).prefill(mesh)["lora/lora"]
    names = lora_specs(model_config(), 4, ("q",))
    factors = sources[-1].load(dict.fromkeys(names, replicated(mesh)))
    certificate = sources[-1].certificate
    assert certificate is not None
    merged = merge(random_weights(model_config()), certificate.lora_module(factors))
    expected = quantise(base.config, merged)
    if backend == "cpu_ffi":
        expected = pack_weights(base.config, jax.device_put(expected, replicated(mesh)))
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert all(map(same_bits, jax.tree.leaves(loaded), jax.tree.leaves(expected)))
    specs = model_specs(base, sources, 1)
    assert specs["lora"].namespace.startswith("isolated/")
    assert f"{base.fingerprint}/{form}" in specs["lora"].namespace


def test_a_form_for_cpus_is_refused_elsewhere(monkeypatch) -> None:
    config = ServeConfig(base="base", models=[ModelEntry("base")], weights="int8-dynamic")
    assert compute_dtype(config, in_format(model_config(), "int8-dynamic")) == "bfloat16"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match=r"int8-dynamic is for CPUs, .* on tpu; use int8"):
        compute_dtype(config)
