"""One pass over a conversation gives what serving it turn by turn gives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.split_rule import Invocation, LastMessage, LastTokens, SplitRule
from pshare_jax.models.attention import CausalAttention, DenseCache, init_cache
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind, init_weights
from pshare_jax.models.split import Certificate, DecodeModule, PrefillModule
from pshare_jax.models.weights import Weights
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.layout import Row, collate, make_row
from pshare_jax.train.loss import LoraShape, Recipe, base_kv, loss_sum, target_logits
from tests.engine.harness import lora_module
from tests.helpers import tiny_config

LLAMA = tiny_config(vocab_size=96)
TURNS = ((5, 8), (11, 15), (18, 21))
BUCKET = Bucket(20, 36, 12, 20)


def conversation(turns=TURNS, seed=0) -> Example:
    tokens = np.random.default_rng(seed).integers(0, 96, turns[-1][1], dtype=np.int32)
    return Example(tokens, tuple(Turn(*turn) for turn in turns), "file:1")


@functools.cache
def weights(config: ModelConfig, seed: int) -> Weights:
    return init_weights(config, seed)


def batch_of(rows: list[Row], teacher: bool = False) -> dict[str, jax.Array]:
    return jax.device_put(collate(rows, BUCKET, max(len(rows), 2), teacher=teacher))


@functools.partial(jax.jit, static_argnums=(0, 1))
def padded_logits(recipe, covered, trainable, base, batch):
    kv = base_kv(recipe, base, batch["prompt"]) if covered else None
    return target_logits(recipe, trainable, base, kv, batch)


def one_pass_logits(recipe, trainable, base, row: Row) -> np.ndarray:
    """The logits after the row's targets."""
    out = padded_logits(recipe, len(row.prompt) > 0, trainable, base, batch_of([row]))
    return np.asarray(out)[0, : len(row.targets)]


DECODED = 18


@functools.partial(jax.jit, static_argnums=(0, 1))
def serve_turn(config, certificate, base, own, lora, tokens, cover):
    """Logits of `DECODED` tokens from position `cover` on: the prefill module over the prompt,
    then the decode module. Slots behind the split hold KV that the decode module overwrites."""
    length = tokens.shape[0]
    io = DenseCache(config, init_cache(config, 1, length, jnp.float32), 0)
    prefill = PrefillModule(config, base, "print")
    prefill.write_kv(tokens[None], jnp.arange(length)[None], io)
    io = DenseCache(config, io.cache, cover)
    positions = cover + jnp.arange(DECODED)
    module = DecodeModule(config, own, certificate, lora)
    return module.logits(tokens[positions][None], positions[None], io)[0]


def served_logits(config, base, own, certificate, example, lora=None) -> np.ndarray:
    """The logits after each answer's tokens, each turn served by itself."""
    # Where a turn is split is said here: one program serves all rules.
    stated = dataclasses.replace(certificate, tail=LastTokens(1))
    tokens = np.zeros(40, np.int32)
    tokens[: len(example.tokens)] = example.tokens
    logits = []
    for turn in example.turns:
        cover = certificate.tail.split(example.tokens[: turn.start].tolist()).covered
        # What follows the turn is not known when it is served.
        known = np.where(np.arange(40) < turn.end, tokens, 0)
        out = serve_turn(config, stated, base, own, lora, known, np.int32(cover))
        logits.append(np.asarray(out)[turn.start - 1 - cover : turn.end - 1 - cover])
    return np.concatenate(logits)


def certificate(tail: SplitRule, **lora) -> Certificate:
    return Certificate("print", tail, "lora" if lora else "full", True, "own", **lora)


def found_in(example: Example, *starts: int) -> list[tuple[int, ...]]:
    """Pairs of tokens that stand at `starts`."""
    return [tuple(example.tokens[start : start + 2].tolist()) for start in starts]


LAST_MESSAGE = LastMessage(tuple(found_in(conversation(), 2, 9, 15)))
"""One message begins in each turn's prompt."""


@pytest.mark.parametrize("tail", [*map(LastTokens, (1, 3, 9)), LAST_MESSAGE], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_one_pass_equals_serving_each_turn(architecture, tail):
    config = tiny_config(architecture=architecture, vocab_size=96)
    base, own = weights(config, 0), weights(config, 1)
    example = conversation()
    ours = one_pass_logits(Recipe(config, "float32"), own, base, make_row(example, tail))
    served = served_logits(config, base, own, certificate(tail), example)
    np.testing.assert_allclose(ours, served, atol=1e-5, rtol=1e-5)


INVOCATION = Invocation(found_in(conversation(), 3)[0])


@pytest.mark.parametrize("tail", [LastTokens(2), LAST_MESSAGE, INVOCATION], ids=str)
def test_one_pass_equals_serving_each_turn_of_a_lora_module(tail):
    lora = lora_module(LLAMA, 3, rank=2, targets=("q", "v", "down"))
    shape = LoraShape(lora.rank, lora.alpha, tuple(lora.targets))
    stated = certificate(
        tail, lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=tuple(lora.targets)
    )
    base, example = weights(LLAMA, 0), conversation()
    recipe = Recipe(LLAMA, "float32", shape)
    ours = one_pass_logits(recipe, lora.weights, base, make_row(example, tail))
    served = served_logits(LLAMA, base, base, stated, example, lora.weights)
    np.testing.assert_allclose(ours, served, atol=1e-5, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, own, tokens):
    decoder = bind(config, own)
    positions = jnp.arange(tokens.shape[1])[None]
    return decoder.logits(decoder.hidden(tokens, positions, CausalAttention(config)))[0]


def ordinary_logits(config, own, example: Example) -> np.ndarray:
    targets = [p for turn in example.turns for p in range(turn.start - 1, turn.end - 1)]
    return np.asarray(forward(config, own, example.tokens[None]))[targets]


@pytest.mark.parametrize("tail", [LastTokens(1), LastTokens(9), None], ids=str)
def test_split_identity(tail):
    """With the base's weights the decode module gives what an ordinary forward gives."""
    base, example = weights(LLAMA, 0), conversation()
    ours = one_pass_logits(Recipe(LLAMA, "float32"), base, base, make_row(example, tail))
    np.testing.assert_allclose(ours, ordinary_logits(LLAMA, base, example), atol=1e-5, rtol=1e-5)


def test_ordinary_fine_tuning_equals_an_ordinary_forward():
    own, example = weights(LLAMA, 1), conversation()
    ours = one_pass_logits(Recipe(LLAMA, "float32"), own, None, make_row(example, None))
    np.testing.assert_allclose(ours, ordinary_logits(LLAMA, own, example), atol=1e-5, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(recipe, trainable, frozen, base, batch):
    kv = base_kv(recipe, base, batch["prompt"])
    return jax.value_and_grad(lambda t: loss_sum(recipe, t, frozen, kv, batch))(trainable)


def test_a_conversation_costs_the_sum_of_its_turns():
    base, own, recipe = weights(LLAMA, 0), weights(LLAMA, 1), Recipe(LLAMA, "float32")
    example = conversation()
    apart = [
        make_row(Example(example.tokens[: turn.end], (turn,), "file:1"), LastTokens(3))
        for turn in example.turns
    ]
    together, gradient = loss_and_gradient(
        recipe, own, {}, base, batch_of([make_row(example, LastTokens(3))])
    )
    total, sums = 0.0, {}
    for row in apart:
        loss, more = loss_and_gradient(recipe, own, {}, base, batch_of([row]))
        total += float(loss)
        sums = {name: sums.get(name, 0) + grad for name, grad in more.items()}
    assert float(together) == pytest.approx(
        total, abs=1e-5 * len(make_row(example, LastTokens(3)).targets)
    )
    for name, grad in gradient.items():
        np.testing.assert_allclose(grad, sums[name], atol=1e-4, rtol=1e-4)


def test_loss_is_the_mean_negative_log_likelihood_of_the_labels():
    base, own, recipe = weights(LLAMA, 0), weights(LLAMA, 1), Recipe(LLAMA, "float32")
    row = make_row(conversation(), LastTokens(1))
    logits = one_pass_logits(recipe, own, base, row).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    expected = np.sum(log_z - logits[np.arange(len(row.labels)), row.labels])
    loss, _ = loss_and_gradient(recipe, own, {}, base, batch_of([row]))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("barriers", [True, False], ids=["accelerator", "cpu"])
def test_remat_changes_no_gradient(barriers):
    """Nor do the chunks of logits, which are what CPUs have in place of barriers."""
    base = weights(LLAMA, 0)
    lora = lora_module(LLAMA, 3, rank=2, targets=("q", "down"))
    shape = LoraShape(lora.rank, lora.alpha, tuple(lora.targets))
    batch = batch_of([make_row(conversation(), LastTokens(2))])
    recipe = Recipe(LLAMA, "float32", shape)
    plain, remat = (
        loss_and_gradient(each, lora.weights, {"base": base}, base, batch)
        for each in (recipe, dataclasses.replace(recipe, remat=True, barriers=barriers))
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_distilling_measures_the_divergence_from_the_teachers_own_reading():
    base, own, teacher = (weights(LLAMA, seed) for seed in (0, 1, 2))
    recipe = Recipe(LLAMA, "float32", teacher=LLAMA)
    example = conversation()
    row = make_row(example, LastTokens(1))
    student = one_pass_logits(recipe, own, base, row).astype(np.float64)
    target = ordinary_logits(LLAMA, teacher, example).astype(np.float64)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (target, student))
    expected = np.sum(np.exp(log_p) * (log_p - log_q))
    batch = batch_of([row], teacher=True)
    loss, _ = loss_and_gradient(recipe, own, {"teacher": teacher}, base, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    # A student that already answers like the teacher has nothing to learn.
    loss, gradient = loss_and_gradient(recipe, base, {"teacher": base}, base, batch)
    assert float(loss) == pytest.approx(0, abs=1e-4)
    assert max(float(jnp.abs(g).max()) for g in gradient.values()) < 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_cpp_multiplies_everywhere(tied):
    """Each projection and the head: forward, and the gradients of both operands; attention too."""
    config = tiny_config(vocab_size=96, tie_word_embeddings=tied)
    recipe = Recipe(config, "bfloat16", matmul="cpu_ffi")
    own = weights(config, 1)
    batch = batch_of([make_row(conversation(), LastTokens(1))])
    kv = jax.make_jaxpr(functools.partial(base_kv, recipe))(own, batch["prompt"])
    assert str(kv).count("pshare_matmul") == 7 * (config.num_layers - 1) + 2
    loss = functools.partial(loss_sum, recipe, frozen={}, kv=None, batch=batch)
    gradient = jax.make_jaxpr(jax.grad(loss))(own)
    assert str(gradient).count("pshare_matmul") == 3 * (7 * config.num_layers + 1)
    # Forward, and the gradient, whose name begins alike.
    assert str(gradient).count("pshare_masked_attention") == 2 * config.num_layers
    lora = lora_module(config, 2, rank=2, targets=("q", "up"))
    shape = LoraShape(lora.rank, lora.alpha, tuple(lora.targets))
    adapted = dataclasses.replace(recipe, lora=shape)
    forward = jax.make_jaxpr(
        functools.partial(loss_sum, adapted, frozen={"base": own}, kv=None, batch=batch)
    )(lora.weights)
    # One more for what an adapter multiplies first; the rest of it is in the projection's.
    assert str(forward).count("pshare_matmul") == (7 + 2) * config.num_layers + 1
