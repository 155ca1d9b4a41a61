"""Schedules, decay, and whose moments exist."""

import jax
import numpy as np
import optax
import pytest

from pshare_jax.models.weights import lora_specs, weight_specs
from pshare_jax.train.config import MeshConfig, OptimizerConfig
from pshare_jax.train.distributed import make_mesh
from pshare_jax.train.loss import LoraShape, Recipe
from pshare_jax.train.optimizer import decays, make_optimizer, step_rates
from pshare_jax.train.step import Computations
from pshare_jax.train.weights import trainable_specs
from tests.train.helpers import MODEL


def rates(schedule: str, warmup: float = 0.2, steps: int = 10) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup=warmup)
    return step_rates(config, steps).tolist()


def test_schedules_rise_linearly_then_fall():
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)
    assert rates("linear") == pytest.approx([0.5, *(1 - np.arange(-1, 8) / 8).clip(max=1)])
    cosine = (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    assert rates("cosine") == pytest.approx([0.5, 1.0, *cosine], rel=1e-5)
    assert rates("linear", warmup=0) == pytest.approx(1 - np.arange(10) / 10)


def test_only_matrices_decay():
    names = decays(dict.fromkeys([*weight_specs(MODEL), "layers.0.attn.q.bias"]))
    assert names["embed.embedding"]
    assert names["layers.0.mlp.up.kernel"]
    assert not names["layers.0.attn_norm.scale"]
    assert not names["layers.0.attn.q.bias"]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_step_by_hand(clip):
    config = OptimizerConfig(
        learning_rate=0.3, schedule="constant", warmup=0, weight_decay=0.1, clip_norm=clip
    )
    optimizer = make_optimizer(config, 10)
    weight, gradient = np.array([1.0, -2.0]), np.array([3.0, 4.0])
    params = {"a.kernel": jax.numpy.asarray(weight), "a.scale": jax.numpy.asarray(weight)}
    state = optimizer.init(params)
    # Earlier versions used it whole, and their checkpoints load.
    whole = optax.adamw(lambda count: 0.1, weight_decay=0.1, mask=decays)
    if clip:
        whole = optax.chain(optax.clip_by_global_norm(clip), whole)
    assert jax.tree.structure(state) == jax.tree.structure(whole.init(params))
    gradients = dict.fromkeys(params, jax.numpy.asarray(gradient))
    moments = np.zeros(2), np.zeros(2)
    for step in (1, 2):
        updates, state = optimizer.update(gradients, state, params, rate=0.1)
        norm = np.sqrt(2 * np.sum(gradient**2))
        clipped = gradient * min(1, clip / norm) if clip else gradient
        moments = 0.9 * moments[0] + 0.1 * clipped, 0.999 * moments[1] + 0.001 * clipped**2
        direction = (moments[0] / (1 - 0.9**step)) / (
            np.sqrt(moments[1] / (1 - 0.999**step)) + 1e-8
        )
        np.testing.assert_allclose(updates["a.scale"], -0.1 * direction, rtol=1e-4)
        np.testing.assert_allclose(
            updates["a.kernel"], -0.1 * (direction + 0.1 * weight), rtol=1e-4
        )


@pytest.mark.parametrize("lora", [None, LoraShape(2, 4.0, ("q", "v"))])
def test_moments_exist_for_decode_parameters_only(lora):
    specs = trainable_specs(MODEL, lora)
    expected = weight_specs(MODEL) if lora is None else lora_specs(MODEL, 2, ("q", "v"))
    assert set(specs) == set(expected)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10)
    computations = Computations(
        Recipe(MODEL, "float32", lora), optimizer, make_mesh(MeshConfig()), specs
    )
    weights = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    state = computations.init_optimizer(weights)
    (moments,) = optax.tree.get_all_with_path(state, "mu")
    assert {name: m.shape for name, m in moments[1].items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    # Two moments for each decode parameter and some counters: nothing for the prefill module.
    size = sum(int(leaf.size) for leaf in jax.tree.leaves(state))
    assert size - 2 * sum(w.size for w in weights.values()) <= 4
