"""Which CPUs a process may use: sets of them, as Linux writes them, and processes kept to one.

A process that is kept to the CPUs of one NUMA node has its memory there, too: Linux gives a thread
pages of the node that it runs on, and all threads of the process inherit where they may run.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from pshare_jax.errors import ConfigError

NUMA = "numa"
"""In place of sets: one for each node of this machine."""

_NODES = Path("/sys/devices/system/node")


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs of a list such as `0-15,32`.

    Raises:
        ConfigError: it is none.
    """
    cpus: set[int] = set()
    try:
        for part in text.strip().split(","):
            first, to, last = part.partition("-")
            found = range(int(first), int(last if to else first) + 1)
            if not found or found[0] < 0:
                raise ValueError(part)
            cpus |= set(found)
    except ValueError:
        raise ConfigError(
            f"cluster.cpus: {text!r} is no list of CPUs such as `0-15` or `0-7,16-23`"
        ) from None
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """The list of CPUs that `parse_cpus` reads."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def allowed_cpus() -> frozenset[int]:
    """CPUs that the calling thread may use; empty where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    return frozenset(os.sched_getaffinity(0))


def cpu_sets(names: Sequence[str | int], nodes: Path = _NODES) -> list[frozenset[int]]:
    """The sets that `cluster.cpus` names; none if it is empty.

    Args:
        names: lists of CPUs, or single ones; or `numa` alone.
        nodes: where the system describes its nodes.

    Raises:
        ConfigError: no such list, a CPU that this process may not use, or a system that cannot
            keep processes to CPUs.
    """
    texts = [str(name) for name in names]
    if not texts:
        return []
    allowed = allowed_cpus()
    if not allowed:
        raise ConfigError("cluster.cpus: this system cannot keep a process to some CPUs")
    if texts == [NUMA]:
        return _nodes(nodes, allowed)
    sets = [parse_cpus(text) for text in texts]
    for text, cpus in zip(texts, sets, strict=True):
        if missing := cpus - allowed:
            raise ConfigError(
                f"cluster.cpus: {text!r} names CPU {min(missing)}, which this process may not use; "
                f"it may use {format_cpus(allowed)}"
            )
    return sets


def _nodes(folder: Path, allowed: frozenset[int]) -> list[frozenset[int]]:
    found = sorted(folder.glob("node[0-9]*/cpulist"), key=lambda f: int(f.parent.name[4:]))
    texts = [file.read_text().strip() for file in found]
    # A node may have memory alone, or no CPU that this process may use.
    sets = [parse_cpus(text) & allowed for text in texts if text]
    return [cpus for cpus in sets if cpus] or [allowed]


@contextmanager
def kept_to(cpus: frozenset[int]) -> Generator[None]:
    """Keeps the calling thread, and so the processes that it starts, to some CPUs; empty is all.

    Raises:
        OSError: the thread may not use them.
    """
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
