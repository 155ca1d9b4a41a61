"""How much memory there is left for weights that are loaded while the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: Any) -> int | None:
    """Bytes that a JAX device can still give; None where nobody says.

    An accelerator says it of its own memory. On a CPU it is what the system has to give without
    swapping, or what a container's limit leaves.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    known = [size for size in (_system_bytes(), _container_bytes()) if size is not None]
    return min(known, default=None)


def _system_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _container_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    # What the kernel caches of files counts as used, so that this is on the safe side.
    return None if limit == "max" else max(int(limit) - used, 0)
