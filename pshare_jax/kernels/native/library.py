"""Compiling and loading the CPU kernels, and registering them with JAX.

The library is compiled at its first use for the very CPU, and kept in a folder named by a hash of
sources, compiler, jaxlib and CPU, so that nothing stale is ever loaded, nor anything made for
another machine that has the same home. The file appears there in one step: processes that start
together may all compile it, and each loads a whole one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

from pshare_jax.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
TARGETS = (
    "pshare_kv_write",
    "pshare_paged_attention",
    "pshare_decoder_layer",
    "pshare_lm_head",
    "pshare_matmul",
    "pshare_gather_pages",
    "pshare_scatter_pages",
    "pshare_copy_pages",
    "pshare_page_checksums",
)
TIMEOUT_SECONDS = 600
_lock = threading.Lock()


class NativeBuildError(Exception):
    """The library cannot be compiled on this machine; the message says why in one line."""


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Args:
        path: its file.
        panel_columns: columns of one panel of a packed matrix, see `src/gemm.h`.
    """

    path: Path
    panel_columns: int
    _library: ctypes.CDLL

    def advise_large_pages(self, arrays: Iterable[jax.Array]) -> None:
        """Asks the operating system to back long-lived arrays by large memory pages."""
        for array in arrays:
            for shard in array.addressable_shards:
                pointer = shard.data.unsafe_buffer_pointer()
                self._library.pshare_large_pages(
                    ctypes.c_void_p(pointer), ctypes.c_size_t(array.nbytes)
                )


def load_library() -> Library | None:
    """The library, compiled if need be; None where it cannot be had, which is logged once."""
    with _lock:
        return _load()


def require_library() -> Library:
    """The library.

    Raises:
        ConfigError: it cannot be had on this machine; the log says why.
    """
    library = load_library()
    if library is None:
        raise ConfigError(
            "kernel_backend cpu_ffi: its C++ library cannot be compiled or loaded here (the log "
            "says why); use `kernel_backend: xla`"
        )
    return library


@functools.cache
def _load() -> Library | None:
    try:
        path, library = _open(cache_folder())
    except (NativeBuildError, OSError) as error:
        logger.warning("CPU kernels are not available, XLA takes their place: %s", error)
        return None
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    logger.info("CPU kernels: %s", path)
    return Library(path, library.pshare_panel_columns(), library)


def cache_folder() -> Path:
    """Where libraries are kept: `pshare_jax/native` below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pshare_jax/native"


def _open(cache: Path) -> tuple[Path, ctypes.CDLL]:
    path = build(cache)
    try:
        return path, ctypes.CDLL(str(path))
    except OSError:  # damaged, by a full disk or a power cut
        path.unlink()
        return path, ctypes.CDLL(str(build(cache)))


def build(cache: Path) -> Path:
    """The compiled library below the folder `cache`, made now unless it is there.

    Raises:
        NativeBuildError: no compiler, or one that fails.
        OSError: a folder that cannot be written.
    """
    compiler = _compiler()
    path = cache / _key(compiler) / "libpshare_cpu.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        include = f"-I{jax.ffi.include_dir()}"
        started = time.monotonic()
        _run([compiler, *FLAGS, include, str(SOURCES / "ffi.cc"), "-o", str(made)])
        os.replace(made, path)
    logger.info("CPU kernels were compiled in %.0f s", time.monotonic() - started)
    return path


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeBuildError("no C++ compiler; install g++ or clang++, or name one by CXX")


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    for text in (_run([compiler, "--version"]), " ".join(FLAGS), version("jaxlib"), _cpu()):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What the compiler's `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return " ".join((platform.machine(), platform.processor(), platform.node()))
    names = ("model name", "flags", "CPU part", "Features")
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(names))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise NativeBuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout
