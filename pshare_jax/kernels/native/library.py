"""Compiling and loading the CPU kernels, and registering them with JAX.

The library is compiled at its first use for the very CPU, and kept in a folder named by a hash of
sources, compiler, jaxlib and CPU, so that nothing stale is ever loaded, nor anything made for
another machine that has the same home. A checksum lies beside it and is compared before every load:
the process that loads a truncated library is killed by the system. One process compiles at a time,
and the others load what it has made. Where the folder cannot be used, a temporary one is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from pshare_jax import runtime_files
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.compiling import NativeBuildError, compile_library, output_of
from pshare_jax.kernels.native.instructions import lacking

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
MARCH_VARIABLE = "PSHARE_MARCH"
"""Of the environment: the compiler's `-march`, for code that is as on a lesser CPU; this one's own
if it is not set. One that names what this CPU lacks is refused."""
MARCH = os.environ.get(MARCH_VARIABLE) or "native"
FLAGS = (
    "-O3",
    f"-march={MARCH}",
    *("-std=c++17", "-fPIC", "-pthread", "-w"),
)
LINK_FLAGS = ("-shared",)
TARGETS = (
    "pshare_kv_write",
    "pshare_paged_attention",
    "pshare_decoder_layer",
    "pshare_lm_head",
    "pshare_matmul",
    "pshare_masked_attention",
    "pshare_masked_attention_gradient",
    "pshare_gather_pages",
    "pshare_scatter_pages",
    "pshare_copy_pages",
    "pshare_page_checksums",
)
_STAGES_BYTES = 1 << 14
AMX_VARIABLE = "PSHARE_AMX"
"""Of the environment: `0` leaves a CPU's matrix unit alone, so that vectors multiply bfloat16."""
_MULTIPLIERS = {0: "vectors", 1: "amx", 2: "twin"}
_WHY_VECTORS = {
    -1: f"{AMX_VARIABLE}=0",
    -2: "the operating system does not let this process use it (arch_prctl ARCH_REQ_XCOMP_PERM)",
    -3: "its results differ from those that its manual gives for them",
}
"""Why the matrix unit is left alone, by what `src/tile_check.h` answers."""
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Args:
        path: its file.
        panel_columns: columns of one panel of a packed matrix, see `src/gemm.h`.
        multiplier: of bfloat16 in this process: `amx`, Intel's matrix unit; `vectors`; or `twin`,
            that unit in C++, of a library compiled for tests. Each sums in an order of its own.
        kv_encode: codes a KV page, see `src/host.cc`; host memory by address, without the GIL.
        kv_decode: the inverse.
        pack: a matrix into panels, see `loading.pack_into`.
        read_tensor: a tensor of a checkpoint, see `loading.read_tensor`.
        widened_bytes: of the process's memory in which pages of 8 bits are widened.
    """

    path: Path
    panel_columns: int
    multiplier: str
    kv_encode: Callable[..., int]
    kv_decode: Callable[..., int]
    pack: Callable[..., None]
    read_tensor: Callable[..., int]
    widened_bytes: Callable[[], int]
    _library: ctypes.CDLL

    @property
    def threads(self) -> int:
        """Threads of the team that works on a call."""
        return self._library.pshare_threads()

    def limit_threads(self, threads: int) -> None:
        """From now on no more than `threads` of the team work on a call; for measurements."""
        self._library.pshare_limit_threads(threads)

    def share_out(self, loops: int, count: int, spins: int) -> None:
        """Runs `loops` loops of `count` iterations of `spins` pauses of the CPU each."""
        self._library.pshare_share_out(*map(ctypes.c_long, (loops, count, spins)))

    def start_trace(self, threads: int) -> None:
        """See `loop_trace.traced`."""
        self._library.pshare_start_trace(threads)

    def end_trace(self, entry: np.dtype) -> tuple[np.ndarray, list[str]]:
        """Ends a trace: its entries, of `Trace::Entry` in `src/trace.h`, and names of stages."""
        entries = np.empty(self._library.pshare_trace_length(), entry)
        stages = ctypes.create_string_buffer(_STAGES_BYTES)
        self._library.pshare_end_trace(
            ctypes.c_void_p(entries.ctypes.data),
            ctypes.c_long(len(entries)),
            stages,
            ctypes.c_long(len(stages)),
        )
        return entries, stages.value.decode().splitlines()

    def advise_large_pages(self, arrays: Iterable[jax.Array]) -> None:
        """Asks the operating system to back long-lived arrays by large memory pages."""
        for array in arrays:
            for shard in array.addressable_shards:
                pointer = shard.data.unsafe_buffer_pointer()
                self._library.pshare_large_pages(
                    ctypes.c_void_p(pointer), ctypes.c_size_t(array.nbytes)
                )


def load_library() -> Library | None:
    """The library, compiled if need be; None where it cannot be had, which is logged once.

    Raises:
        ConfigError: `PSHARE_MARCH` names what this CPU lacks, or the compiler does not know.
    """
    with _lock:
        return _load()


def require_library() -> Library:
    """The library.

    Raises:
        ConfigError: it cannot be had on this machine, and the log says why; or see `load_library`.
    """
    library = load_library()
    if library is None:
        raise ConfigError(
            "kernel_backend cpu_ffi: its C++ library cannot be compiled or loaded here (the log "
            "says why); use `kernel_backend: xla`"
        )
    return library


def widened_bytes() -> int:
    """Bytes of this process in which pages of 8 bits are widened; 0 without the library."""
    library = _load() if _load.cache_info().currsize else None
    return library.widened_bytes() if library is not None else 0


@functools.cache
def _load() -> Library | None:
    try:
        if MARCH != "native":
            _check_march(_compiler())
        path, library = _open_somewhere()
    except (NativeBuildError, OSError) as error:
        logger.warning("CPU kernels are not available, XLA takes their place: %s", error)
        return None
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    multiplier = _start_multiplier(library)
    logger.info("CPU kernels: %s; bfloat16 is multiplied by: %s", path, multiplier)
    columns = library.pshare_panel_columns()
    library.pshare_trace_length.restype = ctypes.c_long
    return Library(
        path, columns, multiplier, *_codec(library), *_loading(library), _widened(library), library
    )


def _check_march(compiler: str) -> None:
    """Raises ConfigError, where the first instruction that the CPU lacks would end the process."""
    asked = f"{MARCH_VARIABLE}={MARCH}"
    try:
        missing = lacking(compiler, MARCH)
    except NativeBuildError as error:
        raise ConfigError(f"{asked}: {error}") from error
    if missing:
        raise ConfigError(
            f"{asked}: this CPU lacks {', '.join(missing)}; name a lesser one, such as "
            "x86-64-v3, or unset it for the CPU's own"
        )


def _start_multiplier(library: ctypes.CDLL) -> str:
    answer = library.pshare_start_tiles(os.environ.get(AMX_VARIABLE, "") != "0")
    if answer in _WHY_VECTORS:
        level = logging.INFO if answer == -1 else logging.WARNING
        logger.log(level, "The CPU's matrix unit (AMX) is not used: %s", _WHY_VECTORS[answer])
    return _MULTIPLIERS.get(answer, "vectors")


def _codec(library: ctypes.CDLL) -> tuple[Callable[..., int], Callable[..., int]]:
    pointer, long = ctypes.c_void_p, ctypes.c_long
    geometry = [long] * 5
    encode, decode = library.pshare_kv_encode, library.pshare_kv_decode
    encode.argtypes = [ctypes.c_int, pointer, *geometry, pointer, pointer, long]
    encode.restype = long
    decode.argtypes = [ctypes.c_int, pointer, long, *geometry, pointer, pointer]
    decode.restype = ctypes.c_int
    return encode, decode


def _loading(library: ctypes.CDLL) -> tuple[Callable[..., None], Callable[..., int]]:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    pack, read_tensor = library.pshare_pack, library.pshare_read_tensor
    pack.argtypes = [pointer, *[long] * 4, integer, long, pointer, ctypes.c_uint32, integer]
    pack.restype = None
    read_tensor.argtypes = [ctypes.c_char_p, *[long] * 3, integer, pointer, integer, integer]
    read_tensor.restype = integer
    return pack, read_tensor


def _widened(library: ctypes.CDLL) -> Callable[[], int]:
    widened = library.pshare_widened_bytes
    widened.restype = ctypes.c_long
    return widened


def cache_folder() -> Path:
    """Where libraries are kept: `pshare_jax/native` below the user's cache folder."""
    return runtime_files.cache_folder("native")


def _open_somewhere() -> tuple[Path, ctypes.CDLL]:
    """The library of the user's cache folder, or of a temporary one where that cannot be used."""
    folder = cache_folder()
    try:
        return _open(folder)
    except OSError as error:
        private = runtime_files.private_folder() / "native"
        if folder == private:
            raise
        opened = _open(private)
        logger.warning(
            "%s: cannot be used (%s): the CPU kernels are kept in %s",
            folder,
            error.strerror or error,
            private,
        )
        return opened


def _open(cache: Path) -> tuple[Path, ctypes.CDLL]:
    path = build(cache)
    try:
        return path, ctypes.CDLL(str(path))
    except OSError:  # made by a compiler whose libraries are gone, say
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
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        if not _is_whole(path):
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        with_flags = (compiler, *FLAGS, f"-I{jax.ffi.include_dir()}")
        started = time.monotonic()
        compile_library(with_flags, LINK_FLAGS, SOURCES, made)
        checksum = Path(folder) / "checksum"
        checksum.write_text(_sha256(made))
        os.replace(made, path)
        os.replace(checksum, _checksum_file(path))
    logger.info("CPU kernels were compiled in %.0f s", time.monotonic() - started)


def _is_whole(path: Path) -> bool:
    """Whether the library is there and is what was compiled."""
    try:
        return _checksum_file(path).read_text() == _sha256(path)
    except (OSError, ValueError):
        return False


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; without a word all of them where the file system knows no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeBuildError("no C++ compiler; install g++ or clang++, or name one by CXX")


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    flags = " ".join(FLAGS + LINK_FLAGS)
    for text in (output_of([compiler, "--version"]), flags, version("jaxlib"), _cpu()):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What the compiler's `-march=native`, and XLA's code, depend on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return " ".join((platform.machine(), platform.processor(), platform.node()))
    names = ("model name", "flags", "CPU part", "Features")
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(names))
