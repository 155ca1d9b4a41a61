from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.split_rule import Invocation, LastMessage, LastTokens
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.attention import CausalAttention, DenseCache, init_cache
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind, init_weights
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.split import (
    Certificate,
    DecodeModule,
    PrefillModule,
    check_certificate,
    isolated_namespace,
    tensor_hash,
)
from pshare_jax.models.weights import Weights, lora_specs
from tests.helpers import ARCHITECTURES, on_device, tiny_config
from tests.pairwise import some

# float32 sums in another order: a few units in the last place of logits around 1.
TOLERANCE = 1e-5
FULL = Certificate(
    "base", tail=LastTokens(1), kind="full", cache_conditioned=True, weights_fingerprint="own"
)
LORA = dataclasses.replace(
    FULL, kind="lora", lora_rank=3, lora_alpha=6.0, lora_targets=("q", "o", "down")
)


def random_lora(config: ModelConfig, certificate: Certificate, seed: int) -> Weights:
    assert certificate.lora_rank is not None
    assert certificate.lora_targets is not None
    rng = np.random.default_rng(seed)
    specs = lora_specs(config, certificate.lora_rank, certificate.lora_targets)
    return {name: on_device(0.2 * rng.standard_normal(s.shape)) for name, s in specs.items()}


@functools.partial(jax.jit, static_argnums=0)
def ordinary_logits(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Logits `[B, n, vocab]` of one forward pass without any cache."""
    decoder = bind(config, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.logits(decoder.hidden(tokens, positions, CausalAttention(config)))


def split_logits(
    config: ModelConfig,
    base: Weights,
    own: Weights,
    certificate: Certificate,
    tokens: jax.Array,
    lora: Weights | None = None,
) -> jax.Array:
    """Logits `[B, n - split, vocab]` of the decode module over the prefill module's KV.

    Cache slots that nobody has written hold large values: reading one would show.
    """
    split = certificate.tail.split(tokens[0].tolist()).covered
    return _split_logits(config, certificate, split, base, own, lora, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _split_logits(config, certificate, split, base, own, lora, tokens):
    prefill = PrefillModule(config, base, "base")
    decode = DecodeModule(config, own, certificate, lora)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    empty = init_cache(config, tokens.shape[0], tokens.shape[1] + 3, jnp.dtype(jnp.float32))
    cache = jax.tree.map(lambda slots: slots + 1e3, empty)
    if split:
        written = DenseCache(config, cache, 0)
        prefill.write_kv(tokens[:, :split], positions[:, :split], written)
        cache = written.cache
    rest = DenseCache(config, cache, split)
    return decode.logits(tokens[:, split:], positions[:, split:], rest)


# Lengths of prompts and tails.
SPLITS = [(1, 1), (1, 2), (2, 1), (9, 1), (9, 2), (9, 5)]


@pytest.mark.parametrize(
    ("architecture", "n", "tail"),
    some(
        [(name, *split) for name in ARCHITECTURES for split in SPLITS],
        [
            ("llama", 1, 1),
            ("llama", 9, 5),
            ("mistral", 1, 2),
            ("mistral", 9, 1),  # further back than its window
            ("qwen2", 2, 1),
            ("qwen2", 9, 2),
            ("qwen3", 9, 1),
        ],
    ),
)
def test_rule_1_split_identity(architecture, n, tail):
    """A decode module whose weights equal the base gives the base model's logits."""
    config = tiny_config(architecture=architecture)
    weights = init_weights(config, seed=1)
    tokens = jnp.asarray(np.random.default_rng(n).integers(0, config.vocab_size, (2, n)), jnp.int32)
    certificate = dataclasses.replace(FULL, tail=LastTokens(tail))

    actual = split_logits(config, weights, weights, certificate, tokens)
    expected = ordinary_logits(config, weights, tokens)[:, -tail:]

    assert actual.shape == (2, min(n, tail), config.vocab_size)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


def test_decode_modules_read_the_bases_kv_not_their_own():
    config = tiny_config()
    base, own = init_weights(config, seed=1), init_weights(config, seed=2)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    shared = split_logits(config, base, own, FULL, tokens)
    isolated = split_logits(config, own, own, FULL, tokens)

    expected = ordinary_logits(config, own, tokens)[:, -1:]
    np.testing.assert_allclose(isolated, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(shared - isolated).max() > 0.1


def test_lora_decode_module_equals_merged_weights():
    config = tiny_config(architecture="qwen3")
    base = init_weights(config, seed=1)
    factors = random_lora(config, LORA, seed=3)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    lora, full = (dataclasses.replace(c, tail=LastTokens(2)) for c in (LORA, FULL))
    merged = merge(base, LORA.lora_module(factors))
    actual = split_logits(config, base, base, lora, tokens, factors)
    expected = split_logits(config, base, merged, full, tokens)
    identity = split_logits(config, base, base, full, tokens)

    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(actual - identity).max() > 0.1


def test_rule_5_certificate():
    """A decode module beside another base is refused, whatever the sharing."""
    check_certificate(FULL, "base", "shared")
    check_certificate(FULL, "base", "isolated")
    for sharing in ("shared", "isolated"):
        with pytest.raises(CertificateError, match=r"coder: made for the base base.* other"):
            check_certificate(FULL, "other", sharing, name="coder")


def test_rule_5_certificate_of_an_ordinary_fine_tune():
    """Weights never trained on the base's KV may be served, but not over that KV."""
    ordinary = dataclasses.replace(FULL, cache_conditioned=False)
    check_certificate(ordinary, "base", "isolated")
    with pytest.raises(CertificateError, match="set `sharing: isolated`"):
        check_certificate(ordinary, "base", "shared")


def test_rule_5_certificate_that_states_a_former_name_of_the_base():
    check_certificate(FULL, "new name", "shared", former=("base",))
    with pytest.raises(CertificateError, match="made for the base base, but this base is new name"):
        check_certificate(FULL, "new name", "shared", former=("another",))


def test_a_module_with_an_invocation_is_never_isolated():
    """Before its invocation, and without it, the base must answer."""
    certificate = dataclasses.replace(LORA, tail=Invocation((5, 6)))
    check_certificate(certificate, "base", "shared")
    with pytest.raises(CertificateError, match=r"critic: .* set `sharing: shared` for it"):
        check_certificate(certificate, "base", "isolated", name="critic")


def test_isolated_kv_is_named_after_the_weights_that_write_it():
    assert isolated_namespace("base", FULL) == "isolated/base/own"
    other = dataclasses.replace(FULL, weights_fingerprint="other")
    names = {
        isolated_namespace("base", FULL),
        isolated_namespace("base 2", FULL),
        isolated_namespace("base", other),
        "base",
    }
    assert len(names) == 4
    # The same weights, whatever else the certificates say.
    longer = dataclasses.replace(FULL, prefill_fingerprint="former", tail=LastTokens(3))
    assert isolated_namespace("base", longer) == isolated_namespace("base", FULL)


@pytest.mark.parametrize(
    "certificate",
    [
        FULL,
        LORA,
        dataclasses.replace(FULL, tail=LastTokens(32)),
        dataclasses.replace(FULL, tail=LastMessage(((1, 4093), (1, 19324)))),
        dataclasses.replace(LORA, tail=Invocation((5, 6))),
    ],
    ids=lambda c: f"{c.kind}-{c.tail}",
)
def test_certificate_survives_json(certificate):
    text = json.dumps(certificate.to_json())
    assert Certificate.from_json(json.loads(text)) == certificate


def test_a_certificate_of_a_number_of_tokens_is_written_as_it_always_was():
    text = (
        '{"prefill_fingerprint": "base", "tail": 1, "kind": "lora", "cache_conditioned": true, '
        '"weights_fingerprint": "own", "lora_rank": 3, "lora_alpha": 6.0, '
        '"lora_targets": ["q", "o", "down"]}'
    )
    assert Certificate.from_json(json.loads(text)) == LORA
    assert json.dumps(LORA.to_json()) == text


def test_an_integer_tail_is_a_number_of_tokens():
    assert dataclasses.replace(FULL, tail=3).tail == LastTokens(3)
    with pytest.raises(CertificateError, match="certificate: tail is 0"):
        dataclasses.replace(FULL, tail=0)


def test_an_invocation_needs_adapters_that_can_be_off():
    with pytest.raises(CertificateError, match="tail is an invocation, which needs kind 'lora'"):
        dataclasses.replace(FULL, tail=Invocation((5, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "1"}, "tail"),
        ({"tail": 0}, "tail is 0"),
        ({"tail": True}, "tail is True"),
        ({"tail": {"invocation": "x"}}, "tail is .*'invocation'.*, but must be"),
        ({"tail": {"last-message": [[]]}}, "not a sequence of token ids"),
        ({"kind": "half"}, "kind"),
        ({"prefill_fingerprint": None}, "prefill_fingerprint"),
        ({"cache_conditioned": "yes"}, "cache_conditioned"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_rank": None}, "lora_rank"),
        ({"lora_targets": ["q", "head"]}, "'head'"),
        ({"kind": "full"}, "LoRA fields are set"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_certificate_refuses_bad_json(change, message):
    with pytest.raises(CertificateError, match=message):
        Certificate.from_json(LORA.to_json() | change)


def test_certificate_refuses_a_missing_field():
    values = FULL.to_json()
    del values["tail"]
    with pytest.raises(CertificateError, match="tail"):
        Certificate.from_json(values)


def test_tensor_hash_sees_dtype_shape_and_bytes():
    x = np.arange(6, dtype=np.float32)
    assert tensor_hash(x) == tensor_hash(jnp.asarray(x))
    hashes = {
        tensor_hash(y)
        for y in (x, x.reshape(2, 3), x.view(np.int32), x[::-1], jnp.asarray(x, jnp.bfloat16))
    }
    assert len(hashes) == 5
    strided = x.reshape(2, 3).T
    assert tensor_hash(strided) == tensor_hash(np.array(strided, order="C"))


def test_modules_name_the_weight_that_does_not_fit():
    config = tiny_config()
    weights = init_weights(config, seed=1)
    wrong = weights | {"final_norm.scale": jnp.ones(3)}
    with pytest.raises(CheckpointError, match=r"final_norm\.scale: shape \[3\]"):
        PrefillModule(config, wrong, "base")
    with pytest.raises(CheckpointError, match=r"final_norm\.scale"):
        DecodeModule(config, wrong, FULL)


def test_decode_module_wants_factors_that_fit_its_certificate():
    config = tiny_config()
    weights = init_weights(config, seed=1)
    factors = random_lora(config, LORA, seed=3)
    with pytest.raises(CheckpointError, match="no LoRA factors"):
        DecodeModule(config, weights, LORA)
    with pytest.raises(CheckpointError, match="kind 'full'"):
        DecodeModule(config, weights, FULL, factors)
    missing = dict(factors)
    del missing["layers.1.attn.o.lora_b"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.o\.lora_b: missing"):
        DecodeModule(config, weights, LORA, missing)
    assert LORA.lora_module(factors) == LoraModule(factors, 6.0, 3, ("q", "o", "down"))
