"""How an op finds its implementation: a table of backends and one rule for `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import load_library

F = TypeVar("F")

BACKEND_NAMES = (
    "xla",
    "reference",
    "cpu_ffi",
    "pallas_tpu",
    "pallas_gpu",
    "pallas_tpu_interpret",
    "pallas_gpu_interpret",
)
"""Every op has all of them. `reference` is the definition, slow; `cpu_ffi` is C++, for CPUs; the
`_interpret` ones run the Pallas kernels in Pallas' interpreter, on any platform and very slowly,
for tests."""

_BY_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
CPU_FFI = "cpu_ffi"


def backend_for(setting: str, platform: str) -> str:
    """What the setting `kernel_backend` means on a platform (`jax.default_backend()`).

    `auto` is Pallas on TPUs and GPUs, C++ on CPUs where it compiles, and XLA elsewhere; any other
    name is kept.

    Raises:
        ConfigError: `cpu_ffi` on another platform.
    """
    if setting == CPU_FFI and platform != "cpu":
        raise ConfigError(f"kernel_backend: cpu_ffi runs on CPUs, but JAX runs on {platform}")
    if setting != "auto":
        return setting
    if platform == "cpu" and load_library() is not None:
        return CPU_FFI
    return _BY_PLATFORM.get(platform, "xla")


def on_mesh(backend: str, num_devices: int) -> str:
    """The backend for a mesh of `num_devices`: C++ runs on one device, XLA splits the work."""
    return "xla" if backend == CPU_FFI and num_devices > 1 else backend


def select_backend(op: str, backends: Mapping[str, F], backend: str) -> F:
    """The implementation of `op` called `backend`; `auto` is the first entry of the table.

    The choice is made at trace time from the name alone, never from the running device, so that
    a function can be compiled for hardware that is not there.

    Raises:
        ValueError: no backend of that name; the message lists those there are.
    """
    if backend == "auto":
        return next(iter(backends.values()))
    try:
        return backends[backend]
    except KeyError:
        names = ", ".join(["auto", *backends])
        raise ValueError(f"{op}: unknown backend {backend!r}; choose one of {names}") from None
