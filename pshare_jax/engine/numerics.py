"""What computes: all that numbers depend on beside weights and tokens, as far as it is known."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import jax

from pshare_jax.kernels.native.library import load_library

PACKAGES = ("kernels", "models", "runtime", "sharding")
"""Of this project: whose code decides what is computed."""


def computed_by(backend: str, mesh_size: int) -> list[str | int | None]:
    """Kernels, devices, versions and code: where all are alike, numbers are rounded alike.

    Args:
        backend: of the kernels.
        mesh_size: devices that compute together.
    """
    device = jax.devices()[0]
    names = [backend, device.platform, device.device_kind, mesh_size, version("jaxlib")]
    library = load_library() if device.platform == "cpu" else None
    # The library is named by sources, compiler and the CPU's instruction sets. With the same one,
    # two processes may multiply by different units (one has PSHARE_AMX=0, say), which sum
    # in different orders.
    compiled = None if library is None else f"{library.path.parent.name} {library.multiplier}"
    precision: str | None = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return [*names, compiled, precision, code_digest(Path(__file__).parents[1])]


@functools.cache
def code_digest(root: Path) -> str:
    """A hash of the Python code of `PACKAGES` below `root`.

    After an upgrade it is another one, so that nothing is used that a mistake of an earlier version
    has computed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()
