"""Every backend of the matrix product and its gradients against numpy in float64."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.matmul import api
from pshare_jax.kernels.matmul.api import lora_matmul, matmul, training_backend
from tests.helpers import on_device

BACKENDS = ["xla", "cpu_ffi"]
# Rows, inner, columns: few and many rows; nothing, or everything, a multiple of a panel or unit; an
# inner axis of more than one block of it; more columns than are packed at a time.
SHAPES = [
    (0, 4, 5),
    (1, 5, 3),
    (7, 33, 47),
    (160, 64, 96),
    (1280, 100, 70),
    (130, 2501, 40),
    (5, 513, 9001),
]


def random(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return on_device(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


@functools.partial(jax.jit, static_argnames=("input_axes", "transposed", "dtype", "backend"))
def with_gradients(x, kernel, gradient, **options):
    y, pull = jax.vjp(functools.partial(matmul, **options), x, kernel)
    return y, *pull(gradient.astype(y.dtype))


def assert_close(actual: jax.Array, expected: np.ndarray, depth: int) -> None:
    """Sums of `depth` products of deviation 1 in float32, rounded if the result is bfloat16."""
    rounding = 2**-8 if actual.dtype == jnp.bfloat16 else 1e-5
    atol = 1e-5 * max(depth, 1) ** 0.5
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding, atol=atol)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers(backend, shape, transposed):
    rows, inner, columns = shape
    x, kernel = random(0, rows, inner), random(1, inner, columns)
    gradient = random(2, rows, columns)  # so that C++, which rounds it, loses nothing
    a, b, g = (np.asarray(array, np.float64) for array in (x, kernel, gradient))
    operand = np.asarray(kernel).T if transposed else kernel
    y, dx, dw = with_gradients(x, operand, gradient, transposed=transposed, backend=backend)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert_close(y, a @ b, inner)
    assert_close(dx, g @ b.T, columns)
    assert_close(dw, (a.T @ g).T if transposed else a.T @ g, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_axes_and_a_bfloat16_result(backend):
    x, kernel, gradient = random(0, 2, 3, 4, 10), random(1, 4, 10, 6), random(2, 2, 3, 6)
    y, dx, dw = with_gradients(x, kernel, gradient, input_axes=2, dtype="bfloat16", backend=backend)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    a, b, g = (np.asarray(array, np.float64) for array in (x, kernel, gradient))
    assert_close(y, np.einsum("btio,ioc->btc", a, b), 40)
    assert_close(dx, np.einsum("btc,ioc->btio", g, b), 6)
    assert_close(dw, np.einsum("btio,btc->ioc", a, g), 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_output_axes(backend):
    x, kernel = random(0, 2, 3, 20), random(1, 20, 3, 8)
    y = matmul(x, kernel, backend=backend)
    expected = np.einsum("bte,ehd->bthd", np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    assert y.shape == (2, 3, 3, 8)
    assert_close(y, expected, 20)


# Rows, inner, rank, columns: a rank that is odd, one above a panel, several parts of the columns.
@pytest.mark.parametrize("shape", [(7, 34, 3, 47), (160, 64, 8, 96), (40, 513, 40, 9001)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_low_rank_update(backend, shape):
    rows, inner, rank, columns = shape
    sizes = (rows, inner), (inner, columns), (inner, rank), (rank, columns), (rows, columns)
    x, kernel, a, b, gradient = (random(seed, *size) for seed, size in enumerate(sizes))
    function = jax.jit(functools.partial(lora_matmul, dtype="bfloat16", backend=backend))
    y, pull = jax.vjp(function, x, kernel, a, b)
    dx, dkernel, da, db = pull(gradient)
    wide = [np.asarray(array, np.float64) for array in (x, kernel, a, b, gradient)]
    X, W, A, B, G = wide
    low = np.asarray(on_device(X @ A, "bfloat16"), np.float64)
    dlow = np.asarray(on_device(G @ B.T, "bfloat16"), np.float64)
    expected = [X @ W + low @ B, G @ W.T + dlow @ A.T, X.T @ G, X.T @ dlow, low.T @ G]
    for mine, other in zip((y, dx, dkernel, da, db), expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        # A sum in float32 may round x A, or its gradient, to the next number.
        error = np.linalg.norm(np.asarray(mine, np.float64) - other)
        assert error <= 2**-8 * np.linalg.norm(other)


def test_a_low_rank_update_of_several_axes():
    x, kernel = random(0, 2, 3, 4, 10), random(1, 4, 10, 2, 6)
    a, b = random(2, 4, 10, 8), random(3, 8, 2, 6)
    ours, xla = (
        lora_matmul(x, kernel, a, b, input_axes=2, backend=backend) for backend in BACKENDS
    )
    assert ours.shape == xla.shape == (2, 3, 2, 6)
    # Both may round x A apart from each other, once in a while.
    np.testing.assert_allclose(ours, xla, rtol=1e-4, atol=0.05)


def test_bits_do_not_depend_on_threads():
    operands = random(0, 300, 100), random(1, 100, 70), random(2, 300, 70, dtype="float32")

    def run(_) -> list[bytes]:
        made = with_gradients(*operands, transposed=False, backend="cpu_ffi")
        return [np.asarray(array).tobytes() for array in made]

    alone = run(0)
    with ThreadPoolExecutor(3) as threads:
        assert all(bits == alone for bits in threads.map(run, range(24)))


def test_updates_that_do_not_fit():
    x, kernel, a = random(0, 2, 4), random(1, 4, 3), random(2, 4, 8)
    with pytest.raises(ValueError, match="multiplies bfloat16, not bfloat16 by float32"):
        lora_matmul(x, kernel, a, random(3, 8, 3, dtype="float32"), backend="cpu_ffi")
    with pytest.raises(jax.errors.JaxRuntimeError, match="the inner axes differ"):
        jax.block_until_ready(lora_matmul(x, kernel, a, random(3, 7, 3), backend="cpu_ffi"))


def test_what_cannot_be_multiplied():
    x, kernel = random(0, 2, 4), random(1, 4, 3)
    with pytest.raises(ValueError, match="matmul: unknown backend 'tpu'"):
        matmul(x, kernel, backend="tpu")
    with pytest.raises(ValueError, match="multiplies bfloat16, not float32 by bfloat16"):
        matmul(x.astype(jnp.float32), kernel, backend="cpu_ffi")
    with pytest.raises(jax.errors.JaxRuntimeError, match="the inner axes differ"):
        jax.block_until_ready(matmul(x, kernel, transposed=True, backend="cpu_ffi"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto", "cpu", 1, "bfloat16"), "cpu_ffi"),
        (("auto", "cpu", 1, "float32"), "xla"),
        (("auto", "cpu", 2, "bfloat16"), "xla"),
        (("auto", "tpu", 1, "bfloat16"), "xla"),
        (("xla", "cpu", 1, "bfloat16"), "xla"),
        (("cpu_ffi", "cpu", 1, "bfloat16"), "cpu_ffi"),
    ],
)
def test_what_training_takes(arguments, expected):
    assert training_backend(*arguments) == expected


def test_training_without_the_library(monkeypatch):
    monkeypatch.setattr(api, "load_library", lambda: None)
    assert training_backend("auto", "cpu", 1, "bfloat16") == "xla"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu", 1, "bfloat16"), "bfloat16 on 1 device.* of platform tpu; use auto or xla"),
        (("cpu", 2, "bfloat16"), "bfloat16 on 2 device"),
        (("cpu", 1, "float32"), "this is float32 on 1 device"),
    ],
)
def test_training_that_insists_in_vain(arguments, message):
    with pytest.raises(ConfigError, match=f"kernel_backend: cpu_ffi .*{message}"):
        training_backend("cpu_ffi", *arguments)
