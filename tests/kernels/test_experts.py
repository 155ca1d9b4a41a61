"""Every backend of grouped experts against their definition, on one device and on meshes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from pshare_jax.kernels.backends import BACKEND_NAMES
from pshare_jax.kernels.experts.api import BACKENDS, experts
from pshare_jax.kernels.experts.gating import Biases
from pshare_jax.sharding.rules import sharding_for
from tests.helpers import on_device
from tests.pairwise import some

EMBED, UNITS = 24, 16
# Tokens, experts, chosen: one token, more experts than choices, one expert for most of the tokens.
SHAPES = [(1, 8, 2), (5, 8, 3), (70, 4, 2)]


def arguments(tokens: int, count: int, per_token: int, dtype: str = "float32"):
    """Experts are chosen unevenly, and the last one by nobody."""
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(count - 1)[:per_token] for _ in range(tokens)])
    chosen[: tokens // 2] = np.sort(chosen[: tokens // 2])[:, ::-1]
    weights = rng.uniform(0.1, 1, (tokens, per_token))
    weights[tokens // 2 :, -1] = 0.0
    normal = [
        rng.standard_normal(shape) / np.sqrt(shape[-2])
        for shape in ((tokens, EMBED), *[(count, EMBED, UNITS)] * 2, (count, UNITS, EMBED))
    ]
    x, gate, up, down = (on_device(a, dtype) for a in normal)
    return x, on_device(weights), jax.device_put(chosen.astype(np.int32)), gate, up, down


def by_definition(x, weights, chosen, gate, up, down):
    """One token and one expert at a time, in float64."""
    x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
    chosen = np.asarray(chosen)
    out = np.zeros(x.shape)
    for n, i in np.ndindex(*chosen.shape):
        of = int(chosen[n, i])
        a = x[n] @ gate[of]
        out[n] += weights[n, i] * ((a / (1 + np.exp(-a)) * (x[n] @ up[of])) @ down[of])
    return out


def test_every_op_has_all_backends():
    assert tuple(BACKENDS) == (*BACKEND_NAMES, "ragged_dot")
    with pytest.raises(ValueError, match="experts: unknown backend 'none'"):
        experts(*arguments(1, 4, 2), backend="none")


@pytest.mark.parametrize(
    ("backend", "shape"),
    some(
        itertools.product(["ragged_dot", "xla", "reference", "pallas_tpu_interpret"], SHAPES),
        [
            ("ragged_dot", SHAPES[0]),
            ("ragged_dot", SHAPES[2]),
            *(("xla", shape) for shape in SHAPES),
            ("reference", SHAPES[1]),
            ("pallas_tpu_interpret", SHAPES[0]),
            ("pallas_tpu_interpret", SHAPES[2]),
        ],
    ),
    ids=str,
)
def test_numbers(backend, shape):
    operands = arguments(*shape)
    out = jax.jit(functools.partial(experts, backend=backend))(*operands)
    np.testing.assert_allclose(out, by_definition(*operands), atol=1e-5)


@pytest.mark.parametrize("backend", ["ragged_dot", "xla"])
def test_bfloat16(backend):
    operands = arguments(9, 8, 3, "bfloat16")
    out = jax.jit(functools.partial(experts, backend=backend))(*operands)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_definition(*operands), atol=0.05)


AXES = [{"tensor": 2}, {"expert": 2}, {"expert": 2, "tensor": 2}]


@pytest.mark.parametrize(
    ("backend", "axes"),
    some(
        itertools.product(["ragged_dot", "xla"], AXES),
        [("ragged_dot", AXES[0]), ("xla", AXES[1]), ("ragged_dot", AXES[2]), ("xla", AXES[2])],
    ),
    ids=str,
)
def test_a_mesh_computes_the_same(backend, axes):
    """Experts that are another device's are left out there, and their garbage too."""
    size = int(np.prod(list(axes.values())))
    mesh = Mesh(np.asarray(jax.devices()[:size]).reshape(*axes.values()), tuple(axes))
    operands = arguments(7, 8, 3)
    names = [(None, None)] * 3 + [("expert", "embed", "mlp")] * 2 + [("expert", "mlp", "embed")]
    shardings = [sharding_for(mesh, a.shape, axes) for a, axes in zip(operands, names, strict=True)]
    assert any(set(s.spec) & set(axes) for s in shardings if isinstance(s, NamedSharding))
    placed = [jax.device_put(a, s) for a, s in zip(operands, shardings, strict=True)]
    out = jax.jit(functools.partial(experts, mesh=mesh, backend=backend))(*placed)
    np.testing.assert_allclose(out, by_definition(*operands), atol=1e-5)


LIMIT = 0.5


def biased_arguments(tokens: int, count: int, per_token: int):
    """The same, and a bias for each product."""
    rng = np.random.default_rng(tokens)
    shapes = ((count, UNITS), (count, UNITS), (count, EMBED))
    biases = Biases(*(on_device(rng.standard_normal(shape)) for shape in shapes))
    return arguments(tokens, count, per_token), biases


def biased_by_definition(operands, biases):
    """gpt-oss's gate, one token and one expert at a time, in float64."""
    x, weights, chosen, gate, up, down = (np.asarray(a, np.float64) for a in operands)
    of_gate, of_up, of_down = (np.asarray(b, np.float64) for b in biases)
    out = np.zeros(x.shape)
    for n, i in np.ndindex(*chosen.shape):
        of = int(chosen[n, i])
        a = np.minimum(x[n] @ gate[of] + of_gate[of], LIMIT)
        b = np.clip(x[n] @ up[of] + of_up[of], -LIMIT, LIMIT)
        hidden = a / (1 + np.exp(-1.702 * a)) * (b + 1)
        out[n] += weights[n, i] * (hidden @ down[of] + of_down[of])
    return out


@pytest.mark.parametrize("backend", ["ragged_dot", "xla", "reference", "pallas_tpu_interpret"])
def test_biases_and_a_bounded_gate(backend):
    operands, biases = biased_arguments(70, 4, 2)
    compute = jax.jit(functools.partial(experts, limit=LIMIT, backend=backend))
    out = compute(*operands, biases=biases)
    np.testing.assert_allclose(out, biased_by_definition(operands, biases), atol=1e-5)


@pytest.mark.parametrize("backend", ["ragged_dot", "xla"])
def test_on_a_mesh_each_bias_is_added_once(backend):
    axes = {"expert": 2, "tensor": 2}
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), tuple(axes))
    operands, biases = biased_arguments(7, 8, 3)
    compute = jax.jit(functools.partial(experts, limit=LIMIT, mesh=mesh, backend=backend))
    out = compute(*operands, biases=biases)
    np.testing.assert_allclose(out, biased_by_definition(operands, biases), atol=1e-5)


def test_the_backend_for_training_has_gradients():
    operands = arguments(6, 4, 2)

    def loss(backend, x, weights, chosen, *kernels):
        return jnp.sum(jnp.sin(experts(x, weights, chosen, *kernels, backend=backend)))

    of = [
        jax.jit(jax.grad(functools.partial(loss, backend), argnums=(0, 1, 3, 4, 5)))(*operands)
        for backend in ("ragged_dot", "reference")
    ]
    for actual, expected in zip(*of, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
