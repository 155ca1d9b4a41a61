"""What calls of the C++ kernels refuse by name, and the memory that they widen pages in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.kernels.decoder_layer.cpu_ffi import LayerShape, decoder_layer, lm_head
from pshare_jax.kernels.decoder_layer.packing import PackedAdapters, PackedLayers, Parts
from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.kernels.kv_write.cpu_ffi import kv_write
from pshare_jax.kernels.native.library import require_library, widened_bytes
from pshare_jax.kernels.paged_attention.api import paged_attention

SHAPE = LayerShape(2, 8, 1e-6, None, None, 1.0, 1.0, gelu=False)
ROWS = np.ones((1, 1), np.int32), np.zeros(1, np.int32), np.ones(1, np.int32)


def operands(**dtypes: str) -> dict[str, Any]:
    """Of a layer over pages of 8 bits that computes in float32, but for some dtypes."""

    def array(name: str, *shape: int, dtype: str = "float32") -> jax.Array:
        return jax.device_put(np.ones(shape, jnp.dtype(dtypes.get(name, dtype))))

    columns = require_library().panel_columns
    count = columns * (8 * 3 + 8 + 8 * 2 + 8)
    return {
        "x": array("x", 1, 1, 8),
        "rope": (array("cosine", 1, 1, 1, 4), array("sine", 1, 1, 1, 4)),
        "layers": PackedLayers(
            array("vectors", 1, 16), array("matrices", 1, count), Parts(), "float32"
        ),
        "adapters": PackedAdapters(array("adapters", 1, 0), 0, 0, ()),
        "adapter_index": array("adapter index", 0, dtype="int32"),
    }


def call_layer(given: dict[str, Any]) -> None:
    pages = jnp.zeros((2, 2, 1, 4, 8), FP8)
    out = decoder_layer(pages=pages, rows=ROWS, layer=0, shape=SHAPE, **given)
    jax.block_until_ready(out)


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("x", "bfloat16", "float32"),
        ("cosine", "float16", "float32"),
        ("sine", "bfloat16", "float32"),
        ("vectors", "bfloat16", "float32"),
        ("adapter index", "uint32", "int32"),
    ],
)
def test_a_layers_operands_of_a_wrong_dtype_are_named(name: str, dtype: str, wanted: str) -> None:
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"{name}: the dtype is {dtype}, not {wanted}"
    ):
        call_layer(operands(**{name: dtype}))


def test_matrices_of_another_dtype_than_adapters_are_named() -> None:
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="matrices: the dtype is float32, not bfloat16"
    ):
        call_layer(operands(adapters="bfloat16"))


def test_a_heads_operands_of_a_wrong_dtype_are_named() -> None:
    head = jnp.ones(require_library().panel_columns * 8)
    lens, wanted, x = jnp.ones(1, jnp.int32), jnp.asarray(True), jnp.ones((1, 8))
    for scale, mask, error in (
        (jnp.ones(8, jnp.bfloat16), None, "scale: the dtype is bfloat16, not float32"),
        (jnp.ones(8), jnp.ones((1, 1), jnp.int32), "mask: the dtype is int32, not uint32"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            jax.block_until_ready(
                lm_head(x, scale, head, lens, wanted, mask, vocab_size=4, eps=1e-6)
            )


def test_positions_of_64_bits_are_refused() -> None:
    pages, new = jnp.zeros((2, 2, 1, 4, 8)), jnp.ones((1, 1, 1, 8))
    with jax.enable_x64(True):
        rows = ROWS[0], jnp.zeros(1, jnp.int64), ROWS[2]
        with pytest.raises(jax.errors.JaxRuntimeError, match="4: the dtype is int64, not int32"):
            jax.block_until_ready(kv_write(pages, new, new, *rows))


def test_memory_of_widened_pages_is_counted() -> None:
    """A quarter more than a call has needed, and the next call of that size takes no more."""
    count, heads, page, dim = 512, 1, 64, 64
    need = 4 * count * 2 * heads * page * dim
    pages = jnp.zeros((count + 1, 2, heads, page, dim), FP8)
    table = jnp.arange(1, count + 1, dtype=jnp.int32)[None]
    q, one = jnp.ones((1, 1, heads, dim)), jnp.ones(1, jnp.int32)
    rows = table, one * (count * page - 1), one
    attend = jax.jit(lambda q, pages, rows: paged_attention(q, pages, *rows, backend="cpu_ffi"))
    before = widened_bytes()
    jax.block_until_ready(attend(q, pages, rows))
    held = widened_bytes()
    assert need <= held <= 1.25 * need + 64 + before
    jax.block_until_ready(attend(q, pages, rows))
    assert widened_bytes() == held


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_page_numbers_of_another_dtype_are_refused_before_they_are_read(dtype: str) -> None:
    """The narrower ones would be read beyond their ends."""
    require_library()
    pages = np.ones((2, 2, 1, 4, 8), np.float32)
    staged = np.ones((1, 3, 2, 1, 4, 8), np.float32)
    good, wrong = np.ones(3, np.int32), np.ones(3, dtype)
    calls: tuple[tuple[str, np.ndarray, tuple[np.ndarray, ...], int], ...] = (
        ("pshare_gather_pages", staged, (pages, wrong), 1),
        ("pshare_scatter_pages", pages, (pages, staged, wrong), 2),
        ("pshare_copy_pages", pages, (pages, wrong, good), 1),
        ("pshare_copy_pages", pages, (pages, good, wrong), 2),
    )
    for name, like, given, operand in calls:
        call = jax.ffi.ffi_call(name, (jax.ShapeDtypeStruct(like.shape, like.dtype),))
        error = f"operand {operand}: the dtype is {dtype}, not int32"
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            jax.block_until_ready(call(*given))


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_rows_of_a_narrow_dtype_are_refused_before_they_are_read(wrong: int) -> None:
    pages, new = jnp.zeros((2, 2, 1, 4, 8)), jnp.ones((1, 1, 1, 8))
    rows = [row.astype(jnp.int8) if i == wrong else row for i, row in enumerate(ROWS)]
    error = "{}: the dtype is int8, not int32"
    with pytest.raises(jax.errors.JaxRuntimeError, match=error.format(3 + wrong)):
        jax.block_until_ready(kv_write(pages, new, new, *rows))
    with pytest.raises(jax.errors.JaxRuntimeError, match=error.format(2 + wrong)):
        jax.block_until_ready(paged_attention(new, pages, *rows, backend="cpu_ffi"))


@pytest.mark.parametrize("wrong", [0, 1])
def test_factors_that_are_not_bfloat16_are_refused(wrong: int) -> None:
    require_library()
    factors = [jnp.ones((2, 2), "float32" if i == wrong else "bfloat16") for i in range(2)]
    call = jax.ffi.ffi_call("pshare_matmul", (jax.ShapeDtypeStruct((2, 2), jnp.float32),))
    error = f"operand {wrong}: the dtype is float32, not bfloat16"
    with pytest.raises(jax.errors.JaxRuntimeError, match=error):
        jax.block_until_ready(call(*factors, transpose_left=False, transpose_right=False))
