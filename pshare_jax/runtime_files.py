"""Folders of files that can be made again: compiled kernels, XLA's programs, fetched wheels."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import stat
import tempfile
import zlib
from pathlib import Path

import xxhash

from pshare_jax.plain_data import is_object

logger = logging.getLogger(__name__)

_ENTRY_SUFFIX = "-cache"
_ACCESS_SUFFIX = "-atime"
_CHECKED = "checked-entries.json"
_CHECKSUM = "xxh3 "
_ZLIB, _ZSTANDARD = b"\x78", b"\x28\xb5\x2f\xfd"
"""How an entry of JAX's compilation cache starts, by how it is compressed."""


def cache_folder(name: str) -> Path:
    """Where the files called `name` are kept: `pshare_jax/NAME` below the user's cache folder.

    That is `$XDG_CACHE_HOME` or `~/.cache`; for a user without a home, which containers often have,
    a folder for temporary files, as the log then says. The folder is not made.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "pshare_jax" / name
    try:
        return Path("~/.cache").expanduser() / "pshare_jax" / name
    except RuntimeError:
        _warn(f"this user has no home folder: caches are kept in {private_folder()}")
        return private_folder() / name


def private_folder() -> Path:
    """A folder below the system's for temporary files that no other user can write to; made here.

    It is the same for all processes of a user, unless somebody else has taken its name: code is
    loaded from it, so a folder that others may write to will not do.
    """
    folder = Path(tempfile.gettempdir()) / f"pshare_jax-{os.geteuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()
        if own and not about.st_mode & 0o022:
            return folder
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    """One folder for this process."""
    return Path(tempfile.mkdtemp(prefix="pshare_jax-"))


@functools.cache
def _warn(message: str) -> None:
    """Says `message` once a process."""
    logger.warning("%s", message)


def compilation_cache_folder(configured: str) -> Path:
    """The folder of XLA's compilation cache: `configured`, made and cleaned, or a temporary one.

    Args:
        configured: a path, which may start with `~`. Where there is no home, or it cannot be
            written, a temporary folder takes its place, as the log then says.
    """
    try:
        folder = Path(configured).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        folder = private_folder() / "xla"
        folder.mkdir(exist_ok=True)
        reason = getattr(error, "strerror", None) or error
        _warn(f"{configured}: cannot be used as compilation cache ({reason}): {folder} is instead")
    clean_compilation_cache(folder)
    return folder


def clean_compilation_cache(folder: str | Path) -> int:
    """Removes the entries of JAX's compilation cache that cannot be read; returns how many.

    A full disk or a power cut leaves files that are empty, cut short or full of zeros. JAX compiles
    anew when it cannot read an entry, but never replaces a file that is there, so that it would at
    every start. To decompress an entry takes 13 ms a megabyte, so those that were whole are listed
    beside them with a checksum, and only that is compared the next time. It also finds what has
    changed in entries without a checksum of their own. An entry that another process is writing
    right now may be removed too; it is then compiled once more.
    """
    removed = 0
    checked = _read_checked(folder)
    whole: dict[str, str] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.path for entry in entries if entry.name.endswith(_ENTRY_SUFFIX)]
        for path in names:
            with contextlib.suppress(OSError):
                name, entry = os.path.basename(path), Path(path).read_bytes()
                mark = _CHECKSUM + xxhash.xxh3_128_hexdigest(entry)
                before = checked.get(name, "")
                # Nobody replaces an entry: one that is not what it was is damaged.
                is_new = not before.startswith(_CHECKSUM)
                if before == mark or (is_new and _is_whole(entry)):
                    whole[name] = mark
                else:
                    os.unlink(path)
                    removed += 1
                    os.unlink(path.removesuffix(_ENTRY_SUFFIX) + _ACCESS_SUFFIX)
    if removed:
        logger.warning("%s: removed %d empty or damaged compiled programs", folder, removed)
    if whole != checked:
        _write_checked(folder, whole)
    return removed


def _read_checked(folder: str | Path) -> dict[str, str]:
    try:
        known = json.loads((Path(folder) / _CHECKED).read_bytes())
    except (OSError, ValueError):
        return {}
    if not is_object(known):
        return {}
    return {name: mark for name, mark in known.items() if isinstance(mark, str)}


def _write_checked(folder: str | Path, whole: dict[str, str]) -> None:
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(dir=folder, prefix=_CHECKED)
        with os.fdopen(handle, "w") as file:
            json.dump(whole, file)
        os.replace(path, Path(folder) / _CHECKED)


def _is_whole(entry: bytes) -> bool:
    """Whether JAX can decompress it; zlib's checksum finds a changed byte too."""
    if entry.startswith(_ZLIB):
        try:
            zlib.decompress(entry)
        except zlib.error:
            return False
        return True
    return entry.startswith(_ZSTANDARD) and _is_whole_zstandard(entry)


def _is_whole_zstandard(entry: bytes) -> bool:
    """The same where the package zstandard is installed, which JAX then takes.

    What is cut is found, a changed byte only where the form no longer holds: JAX adds no checksum.
    So a change is noticed if it comes after the first check, see `clean_compilation_cache`.
    """
    try:
        import zstandard
    except ImportError:
        return False  # JAX could not read it either
    try:
        zstandard.ZstdDecompressor().decompress(entry)
    except zstandard.ZstdError:
        return False
    return True
