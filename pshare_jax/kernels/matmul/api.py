"""Activations times weights: the products of a decoder, with a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import BACKEND_NAMES, CPU_FFI, select_backend
from pshare_jax.kernels.matmul import cpu_ffi, xla
from pshare_jax.kernels.native.library import load_library, require_library

MATMUL = {
    name: cpu_ffi.matmul if name == CPU_FFI else xla.matmul for name in ("xla", *BACKEND_NAMES)
}
"""XLA serves the accelerators: their matrix units are what it knows best."""


def matmul(
    x: jax.Array,
    kernel: jax.Array,
    *,
    input_axes: int = 1,
    transposed: bool = False,
    dtype: Any = jnp.float32,
    backend: str = "auto",
) -> jax.Array:
    """Multiplies, accumulating in float32. Differentiable in reverse mode.

    Args:
        x: `[..., *in]`.
        kernel: `[*in, *out]`, dtype of x, or in XLA one of 8 bits; `[out, in]` if `transposed`.
        input_axes: the number of `in` axes.
        transposed: of a kernel with two axes.
        dtype: of the result.
        backend: a key of the table, or `auto`, which is XLA. `cpu_ffi` takes bfloat16 only.

    Returns:
        `[..., *out]`.

    Raises:
        ValueError: an unknown backend, or a dtype that it does not take.
    """
    function = select_backend("matmul", MATMUL, backend)
    return function(x, kernel, input_axes=input_axes, transposed=transposed, dtype=dtype)


def lora_matmul(
    x: jax.Array,
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    input_axes: int = 1,
    dtype: Any = jnp.float32,
    backend: str = "auto",
) -> jax.Array:
    """As `matmul`, with a low-rank update of the kernel by `a b`; x times a is rounded like x.

    In C++ the update is added within the product, and so are the gradients of its input: no array
    of the size of the result is written more than once.

    Args:
        x: `[..., *in]`.
        kernel: `[*in, *out]`, dtype of x.
        a: `[*in, rank]`, dtype of x.
        b: `[rank, *out]`, dtype of x.
        input_axes: the number of `in` axes.
        dtype: of the result.
        backend: as of `matmul`.

    Returns:
        `[..., *out]`.

    Raises:
        ValueError: an unknown backend, or a dtype that it does not take.
    """
    if backend == CPU_FFI:
        return cpu_ffi.lora_matmul(x, kernel, a, b, input_axes=input_axes, dtype=dtype)
    y = matmul(x, kernel, input_axes=input_axes, backend=backend)
    low = matmul(x, a, input_axes=input_axes, dtype=x.dtype, backend=backend)
    return (y + matmul(low, b, backend=backend)).astype(dtype)


def training_backend(setting: str, platform: str, num_devices: int, dtype: str) -> str:
    """What the setting `kernel_backend` means for the products of training.

    `auto` is C++ where it is the faster one: bfloat16 on one device that is a CPU, if there is a
    compiler. It is XLA elsewhere.

    Args:
        setting: `auto`, `xla` or `cpu_ffi`.
        platform: of the mesh's devices.
        num_devices: of the mesh.
        dtype: name of the dtype of activations.

    Raises:
        ConfigError: `cpu_ffi` where it cannot be; the message says why.
    """
    if setting == CPU_FFI:
        if platform != "cpu" or num_devices != 1 or dtype != "bfloat16":
            raise ConfigError(
                f"kernel_backend: cpu_ffi multiplies bfloat16 on one CPU device, but this is "
                f"{dtype} on {num_devices} device(s) of platform {platform}; use auto or xla"
            )
        require_library()
        return CPU_FFI
    if setting != "auto" or platform != "cpu" or num_devices != 1 or dtype != "bfloat16":
        return "xla"
    return CPU_FFI if load_library() is not None else "xla"
