"""Adapters of all kinds, as PEFT saves them: the same logits, or refused by name.

`tests/golden/make_adapters.py` made them; expected are the logits of transformers with peft.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert import hf, names, peft
from pshare_jax.convert.peft_merge import merged_tensors
from pshare_jax.convert.tensors import as_lazy
from pshare_jax.core.split_rule import Invocation
from pshare_jax.errors import CheckpointError
from pshare_jax.models.attention import CausalAttention, DenseCache, init_cache
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.models.lora import Adapters, LoraModule, check_lora, merge, stack_adapters
from pshare_jax.models.registry import config_from_hf
from pshare_jax.models.weights import Weights, weight_specs
from tests.golden import GOLDEN

KINDS = {
    line["kind"]: line
    for line in map(json.loads, (GOLDEN / "adapters.jsonl").read_text().splitlines())
}

REFUSED = {
    "adapted embedding": "model.embed_tokens.lora_embedding_A.* is unexpected",
    "tokens of their own": "trainable_token_indices=.* is not supported",
    "lora_bias": "lora_bias=True is not supported",
    "replicated layers": "layer_replication=.* is not supported",
    "pissa": "init_lora_weights='pissa' is not supported: it changes the base's weights",
    "olora": "init_lora_weights='olora' is not supported: it changes the base's weights",
    "tied, saved head": "gives the output head other values than the embedding, but the base ties",
    "tied, saved embedding": "gives the output head other values than the embedding",
    "tied, adapted head": "lm_head.lora_A.weight is unexpected",
    "mixtral, experts": "target_parameters=.* is not supported",
    "ia3": "peft_type='IA3' is not supported",
    "loha": "peft_type='LOHA' is not supported",
    "lokr": "peft_type='LOKR' is not supported",
    "vera": "peft_type='VERA' is not supported",
    "oft": "peft_type='OFT' is not supported",
    "prompt tuning": "peft_type='PROMPT_TUNING' is not supported",
    "adalora": "peft_type='ADALORA' is not supported",
}
"""What each message says."""


@functools.cache
def saved() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "adapters.safetensors")


@functools.cache
def base_of(case: str) -> tuple[ModelConfig, Weights, np.ndarray]:
    config = config_from_hf(json.loads((GOLDEN / f"{case}.json").read_text()))
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    weights = {
        native: names.read_native(native, config, tensors.__getitem__).astype(np.float32)
        for native in weight_specs(config)
    }
    return config, weights, tensors["golden.input_ids"]


def write_folder(folder: Path, kind: str) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(KINDS[kind]["config"]))
    tensors = {
        name.removeprefix(f"{kind}/"): value
        for name, value in saved().items()
        if name.startswith(f"{kind}/") and name != f"{kind}/logits"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    decoder = bind(config, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.logits(decoder.hidden(tokens, positions, CausalAttention(config)))[0]


def activated_logits(
    config: ModelConfig, weights: Weights, module: LoraModule, tokens: jax.Array, start: int
) -> jax.Array:
    """Of the tokens from `start` on, over the base's KV of those before."""
    return jax.jit(functools.partial(_activated_logits, config, module, start))(weights, tokens)


def _activated_logits(
    config: ModelConfig, module: LoraModule, start: int, weights: Weights, tokens: jax.Array
) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    decoder = bind(config, weights)
    written = DenseCache(config, init_cache(config, 1, tokens.shape[1], jnp.dtype("float32")), 0)
    decoder.write_kv(tokens[:, :start], positions[:, :start], written)
    rest = DenseCache(config, written.cache, start)
    adapters = Adapters(stack_adapters([module]), jnp.zeros(1, jnp.int32))
    return decoder.logits(decoder.hidden(tokens[:, start:], positions[:, start:], rest, adapters))[
        0
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts_or_it_is_refused(tmp_path: Path, kind: str) -> None:
    config, weights, tokens = base_of(KINDS[kind]["case"])
    expected = saved()[f"{kind}/logits"]
    prompt = jnp.asarray(tokens[:, : len(expected)], jnp.int32)
    base = {name: as_lazy(value) for name, value in weights.items()}
    folder = write_folder(tmp_path, kind)
    if kind in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[kind]):
            merged_tensors(peft.read_adapter(folder, config), config, base)
        return
    source = peft.read_adapter(folder, config)
    plain = np.asarray(logits(config, weights, prompt))
    if not source.is_lora:
        with pytest.raises(CheckpointError, match="is no LoRA module alone"):
            peft.read_lora(folder, config)
        found = hf.native_tensors(config, merged_tensors(source, config, base))
        merged = {name: jnp.asarray(tensor.read()) for name, tensor in found.items()}
        actual = logits(config, merged, prompt)
    else:
        lora = peft.read_lora(folder, config)
        factors = {name: tensor.read() for name, tensor in lora.tensors.items()}
        module = LoraModule(factors, lora.alpha, lora.rank, lora.targets)
        check_lora(config, module)
        if lora.invocation is not None:
            split = Invocation(lora.invocation).split(prompt[0].tolist())
            if not split.invoked:
                actual = plain
            else:
                actual = np.concatenate(
                    [
                        plain[: split.covered],
                        activated_logits(config, weights, module, prompt, split.covered),
                    ]
                )
        else:
            actual = logits(config, merge(weights, module), prompt)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    invoked = kind != "activated, not invoked"
    assert (np.abs(plain - expected).max() > 0.01) == invoked


def with_its_own_head(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """As `import --untie-head` makes it."""
    head = {"lm_head.kernel": weights["embed.embedding"].T}
    return dataclasses.replace(config, tie_word_embeddings=False), {**weights, **head}


@pytest.mark.parametrize("kind", ["tied, saved head", "tied, adapted head"])
def test_a_base_that_was_untied_takes_adapters_with_a_head(tmp_path: Path, kind: str) -> None:
    config, weights, tokens = base_of(KINDS[kind]["case"])
    config, weights = with_its_own_head(config, weights)
    expected = saved()[f"{kind}/logits"]
    base = {name: as_lazy(value) for name, value in weights.items()}
    source = peft.read_adapter(write_folder(tmp_path, kind), config)
    found = hf.native_tensors(config, merged_tensors(source, config, base))
    merged = {name: jnp.asarray(tensor.read()) for name, tensor in found.items()}
    actual = logits(config, merged, jnp.asarray(tokens[:, : len(expected)], jnp.int32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_the_kinds_are_those_that_were_made() -> None:
    assert set(REFUSED) < set(KINDS)
    assert len(KINDS) == 79
