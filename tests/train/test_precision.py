"""Gradients in bfloat16 are as close to those in float32 as JAX's own rules make them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.split_rule import LastTokens
from pshare_jax.kernels.matmul import xla
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.weights import LORA_TARGETS, Weights
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.layout import collate, make_row
from pshare_jax.train.loss import LoraShape, Recipe, base_kv, loss_sum
from tests.engine.harness import lora_module
from tests.helpers import tiny_config

CONFIG = tiny_config(vocab_size=96, num_layers=1)
LORA = LoraShape(4, 8.0, LORA_TARGETS)
BUCKET = Bucket(24, 24, 8, 32)


compiled_kv = jax.jit(base_kv, static_argnums=0)


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows = []
    for length in (29, 26, 31):
        tokens = rng.integers(0, 96, length, dtype=np.int32)
        example = Example(tokens, (Turn(length - 7, length),), "file:1")
        rows.append(make_row(example, LastTokens(4)))
    return jax.device_put(collate(rows, BUCKET, 4, teacher=False))


def gradients(dtype: str, backend: str, base: Weights, own: Weights | None) -> Weights:
    """Of the base's weights, or of a LoRA's."""
    recipe = Recipe(CONFIG, dtype, own and LORA, matmul=backend, barriers=False)
    arrays = batch()
    low = {name: weight.astype(dtype) for name, weight in base.items()}
    kv = compiled_kv(Recipe(CONFIG, dtype), low, arrays["prompt"])
    gradient = jax.jit(
        jax.grad(lambda trained: loss_sum(recipe, trained, {"base": low}, kv, arrays))
    )
    return gradient(own if own is not None else base)


def errors(found: Weights, exact: Weights) -> dict[str, float]:
    """Of each weight's gradient, as a part of its norm."""
    assert found.keys() == exact.keys()
    assert all(gradient.dtype == jnp.float32 for gradient in found.values())
    return {
        name: float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]))
        for name in exact
    }


@pytest.mark.parametrize("kind", ["all weights", "LoRA"])
def test_gradients_are_as_close_to_float32_as_before_rounding(kind, monkeypatch):
    """JAX's own rule multiplies the float32 gradient of a product, and rounds what comes out.

    Rounding it first is one error more of the size of those that are there: of the norm 0.0011 on
    average, beside the rounding of operands and results of each operation. Some weights' gradients
    are small differences, of which every error is a large part, whoever computes: hence a factor,
    besides an amount.
    """
    base = init_weights(CONFIG, 0)
    own = None
    if kind == "LoRA":
        own = dict(lora_module(CONFIG, 1, rank=4, targets=LORA_TARGETS).weights)
    exact = gradients("float32", "xla", base, own)
    ours = {backend: gradients("bfloat16", backend, base, own) for backend in ("xla", "cpu_ffi")}
    monkeypatch.setattr(xla, "_matmul", xla._product)
    before = errors(gradients("bfloat16", "xla", base, own), exact)
    for backend, found in ours.items():
        for name, error in errors(found, exact).items():
            assert error < 1.5 * before[name] + 0.004, f"{backend}: {name}: {before[name]:.4f}"
