"""What becomes of memory that is freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pshare_jax.runtime import host_memory
from pshare_jax.runtime.host_memory import keep_freed_memory, return_freed_memory


def test_freed_memory_is_kept_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Glibc:
        malloc_trim = calls.append

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: Glibc())
    return_freed_memory()
    assert calls == [0]
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    return_freed_memory()
    assert calls == [0]
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [
        ("", [], True),
        ("", ["libtpu"], False),
        ("", ["jax_plugins"], False),
        ("cpu", ["jax_plugins"], True),
        ("cuda,cpu", ["jax_plugins"], False),
    ],
)
def test_what_jax_will_compute_on(
    platforms: str, installed: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(
        host_memory.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    assert host_memory.computes_on_cpus() == expected


_USES_MEMORY_AGAIN = """
import resource, sys
import numpy as np
from pshare_jax.runtime.host_memory import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 << 20, np.uint8)[:: 4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not keep_freed_memory():
    sys.exit("not glibc")
print(faults(), faults(), end=" ")
return_freed_memory()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of the C library of Linux")
def test_a_large_array_is_made_where_the_last_one_was() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _USES_MEMORY_AGAIN], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    first, again, after_return = map(int, run.stdout.split())
    # Pages of 4 KiB, or of 2 MiB.
    assert first >= 32
    assert again < first / 4
    assert after_return >= 32
