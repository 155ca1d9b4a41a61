"""`bench machine`: what this CPU can do at most, by which other figures can be judged."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.bench import machine
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.matmul.api import matmul
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kernels.page_transfer.cpu_ffi import page_checksums

_MULTIPLIERS = {
    "amx": "the matrix unit (AMX)",
    "vectors": "vectors",
    "twin": "the matrix unit's twin in C++",
}


@dataclass(frozen=True)
class MachineOptions:
    """How long is measured.

    Args:
        repeats: of each figure, of which the best one counts.
        size: rows, columns and inner axis of the products.
        megabytes: read from memory at a time; many times the last cache.
    """

    repeats: int = 5
    size: int = 2048
    megabytes: int = 512


def run(options: MachineOptions) -> dict[str, Any]:
    """The CPU, what multiplies bfloat16 on it, and its measured rates with all cores.

    Raises:
        ConfigError: options that make no sense, or no C++ library on this machine.
    """
    if min(options.repeats, options.size, options.megabytes) < 1:
        raise ConfigError("bench machine: repeats, size and megabytes must be 1 or more")
    return {
        "options": asdict(options),
        "machine": machine.describe(),
        "amx": machine.has_amx(),
        "multiplier": require_library().multiplier,
        "gflops": {
            "bfloat16": _gflops(options, "bfloat16", "cpu_ffi"),
            "float32": _gflops(options, "float32", "xla"),
        },
        "read_gb_per_s": read_rate(options),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """What is printed of it."""
    used, rates = result["multiplier"], result["gflops"]
    unit = "there, and used" if used == "amx" else "there, but not used"
    return [
        f"matrix unit (AMX): {unit if result['amx'] else 'not there'}",
        f"bfloat16 products by {_MULTIPLIERS[used]}, {result['options']['size']} rows: "
        f"{rates['bfloat16']:.0f} GFLOP/s",
        f"float32 products by XLA: {rates['float32']:.0f} GFLOP/s",
        f"reading memory: {result['read_gb_per_s']:.1f} GB/s",
    ]


def _gflops(options: MachineOptions, dtype: str, backend: str) -> float:
    shape = (options.size, options.size)
    random = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    left, right = jnp.asarray(random, dtype)
    multiply = jax.jit(functools.partial(matmul, dtype=dtype, backend=backend))
    return 2 * options.size**3 / _best(options, lambda: multiply(left, right)) / 1e9


def read_rate(options: MachineOptions) -> float:
    """Of the sums over pages of a pool, in C++, by all threads."""
    pages, words = 4 * options.megabytes, 1 << 16
    staged = jnp.ones((1, pages, words), jnp.float32)
    summed = jax.jit(page_checksums)
    return pages * words * 4 / _best(options, lambda: summed(staged)) / 1e9


def _best(options: MachineOptions, run: Callable[[], jax.Array]) -> float:
    """Seconds of the quickest of the repeats; the first call compiles."""
    seconds = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
