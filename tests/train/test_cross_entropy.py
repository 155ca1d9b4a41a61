"""Losses over a large vocabulary: the same values and gradients with less memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.train import cross_entropy as module
from pshare_jax.train.cross_entropy import cross_entropy, sum_over_chunks
from tests.helpers import on_device

VOCAB = 20


def plain(logits, labels):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen[..., 0]


def batch(length: int = 13):
    rng = np.random.default_rng(0)
    hidden = on_device(rng.normal(size=(2, length, 6)))
    head = on_device(rng.normal(size=(6, VOCAB)))
    targets = {
        "labels": jnp.asarray(rng.integers(0, VOCAB, (2, length))),
        "weights": on_device(rng.uniform(size=(2, length))),
    }
    return head, hidden, targets


def losses(head, hidden, targets):
    return jnp.sum(plain(hidden @ head, targets["labels"]) * targets["weights"])


def in_chunks(head, hidden, targets):
    return sum_over_chunks(functools.partial(losses, head), hidden, targets)


def assert_same(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6, rtol=1e-5)


def test_cross_entropy_and_its_gradient():
    head, hidden, targets = batch()
    # Far from zero, and one that is certain.
    logits = (hidden @ head + 300.0).at[0, 0, 3].set(400.0)

    def weighted(function, logits):
        return jnp.sum(function(logits, targets["labels"]) * targets["weights"])

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(weighted, function)))(logits)
        for function in (cross_entropy, plain)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("chunk", [10, 100], ids=["chunks", "one chunk"])
def test_a_loss_in_chunks_is_the_loss(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arguments = batch()

    def scaled(function, head, hidden, targets):
        return 3.0 * function(head, hidden, targets)  # a gradient that comes in and is not 1

    whole, apart = (
        jax.jit(jax.value_and_grad(functools.partial(scaled, f), argnums=(0, 1)))(*arguments)
        for f in (losses, in_chunks)
    )
    assert_same(apart, whole)
    assert_same(jax.jit(in_chunks)(*arguments), losses(*arguments))


def test_what_is_frozen_costs_no_gradient(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    head, hidden, targets = batch()

    def products(argnums) -> int:
        gradient = jax.grad(in_chunks, argnums=argnums)
        return str(jax.make_jaxpr(gradient)(head, hidden, targets)).count("dot_general")

    assert products((0, 1)) == 3
    assert products(1) == 2


def test_no_gradient_holds_all_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    text = str(jax.make_jaxpr(jax.grad(in_chunks, argnums=(0, 1)))(*batch()))
    assert f"f32[2,5,{VOCAB}]" in text
    assert f"f32[2,13,{VOCAB}]" not in text
    assert f"f32[3,2,5,{VOCAB}]" not in text, "kept of all chunks"


def test_chunks_are_alike(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 24)
    text = str(jax.make_jaxpr(lambda *arrays: in_chunks(*arrays))(*batch()))
    assert f"f32[2,7,{VOCAB}]" in text, "two of 7, not of 12"
