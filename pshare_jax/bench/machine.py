"""The machine and the versions that a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import pshare_jax

PACKAGES = ("pshare_jax", "jax", "jaxlib", "flax", "numpy")
_VECTORS = {
    "amx_bf16": "AMX and AVX512-BF16",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
"""Flags of /proc/cpuinfo, best first: CPUs of one name may differ, and so do their figures."""


def describe() -> dict[str, Any]:
    """CPU model, cores, memory (GiB), operating system and package versions."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: there for name in PACKAGES if (there := _version(name)) is not None},
    }


def one_line(machine: dict[str, Any]) -> str:
    """The description on one line, for below a table."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}, {packages}"
    )


def cpu_model(info: str) -> str:
    """The CPU's name and the best vector instructions it has.

    Args:
        info: the text of /proc/cpuinfo.

    Returns:
        The name alone, or "", where the text does not tell.
    """
    facts: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    vectors = next((name for flag, name in _VECTORS.items() if flag in flags), None)
    name = facts.get("model name", "")
    return f"{name} with {vectors}" if name and vectors else name


def has_amx(info: str | None = None) -> bool:
    """Whether the CPU has Intel's matrix unit for bfloat16, and the system knows of it.

    Args:
        info: the text of /proc/cpuinfo; None reads it.
    """
    if info is None:
        file = Path("/proc/cpuinfo")
        info = file.read_text() if file.is_file() else ""
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return {"amx_tile", "amx_bf16"} <= set(flags)


def _version(package: str) -> str | None:
    """None for one that is not there: JAX and numpy do for `bench.hardware`."""
    if package == "pshare_jax":
        return pshare_jax.__version__  # which may be a checkout that is not installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = cpu_model(info.read_text()) if info.is_file() else ""
    march = os.environ.get("PSHARE_MARCH")  # of kernels.native.library, which would import jax
    built = f", C++ for {march}" if march else ""
    return (found or platform.processor() or "unknown CPU") + built


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
