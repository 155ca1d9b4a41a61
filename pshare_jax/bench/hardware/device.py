"""The device that is measured: what it is, what its vendor says that it can do, and a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


@dataclass(frozen=True)
class Published:
    """A vendor's figures of one device: bytes a second of its memory, and dense bfloat16
    operations a second."""

    bandwidth: float
    peak: float


# NVIDIA's data sheets (SXM where there are several forms) and Cloud TPU's system architecture, by
# what JAX's `device_kind` has in it; the first that fits.
_PUBLISHED = (
    ("B200", Published(8000e9, 2250e12)),
    ("GH200", Published(4000e9, 989e12)),
    ("H200", Published(4800e9, 989e12)),
    ("H100 PCIe", Published(2039e9, 756e12)),
    ("H100", Published(3352e9, 989e12)),
    ("A100-SXM4-40GB", Published(1555e9, 312e12)),
    ("A100-PCIE-40GB", Published(1555e9, 312e12)),
    ("A100", Published(2039e9, 312e12)),
    ("L40S", Published(864e9, 362e12)),
    ("L4", Published(300e9, 121e12)),
    ("A10G", Published(600e9, 70e12)),
    ("RTX 4090", Published(1008e9, 165e12)),
    ("TPU v4", Published(1228e9, 275e12)),
    ("TPU v5 lite", Published(819e9, 197e12)),
    ("TPU v5e", Published(819e9, 197e12)),
    ("TPU v5", Published(2765e9, 459e12)),
    ("TPU v6", Published(1640e9, 918e12)),
    ("TPU7x", Published(7380e9, 2307e12)),
)


class SkippedError(Exception):
    """A part that this machine cannot run; says why."""


def published(kind: str) -> Published | None:
    """The vendor's figures for a `device_kind`; None for one that is not known."""
    return next((figures for name, figures in _PUBLISHED if name in kind), None)


def mesh() -> Mesh:
    """The one device that is measured."""
    return Mesh(np.asarray(jax.devices()[:1]), ("tensor",))


def describe() -> dict[str, Any]:
    """What is measured: `{"platform", "kind", "count", "memory_bytes", "bandwidth", "peak"}`;
    None where it is not known."""
    device = jax.devices()[0]
    known = published(device.device_kind)
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": len(jax.devices()),
        "memory_bytes": memory_bytes(),
        "bandwidth": known.bandwidth if known else None,
        "peak": known.peak if known else None,
        "jax": jax.__version__,
    }


def memory_bytes() -> int | None:
    """Bytes of the device that JAX may use; None where it has no limit of its own."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def need_memory(needed: float) -> None:
    """Refuses what would not fit.

    Raises:
        SkippedError: the device has less than `needed` bytes.
    """
    have = memory_bytes()
    if have is not None and have < needed:
        raise SkippedError(
            f"needs {needed / 2**30:.0f} GiB, JAX may use {have / 2**30:.0f} GiB here"
        )


def seconds(call: Callable[[], Any], repeats: int, least: float) -> float:
    """Seconds of one call, the median of `repeats` timings of at least `least` seconds each.

    Args:
        call: gives arrays, whose last ones are waited for at the end of each timing.
        repeats: timings.
        least: seconds of one timing, over so many calls as that takes.
    """
    jax.block_until_ready(call())  # compiles
    started = time.perf_counter()
    jax.block_until_ready(call())
    once = max(time.perf_counter() - started, 1e-6)
    calls = max(1, int(least / once))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        out = None
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)
