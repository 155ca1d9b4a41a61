"""Folders and files that appear whole or not at all, and errors that fit on one line."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pshare_jax.errors import CheckpointError, DataError, printable

logger = logging.getLogger(__name__)

REMOVE_ATTEMPTS = 20
LOCKED_AFTER_SECONDS = 60


def one_line(error: BaseException) -> str:
    """The gist of `error`: the first non-empty line of its message, shortened."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return (line or type(error).__name__)[:400]


def check_absent(dest: Path) -> None:
    """Raises CheckpointError when `dest` exists: nothing is ever overwritten."""
    if dest.exists() or dest.is_symlink():
        raise CheckpointError(f"{dest}: exists already; remove it or choose another destination")


def check_space(dest: Path, needed: int) -> None:
    """Raises CheckpointError when the disk of the folder `dest` has less than `needed` bytes free.

    A full disk would be noticed while writing too, but only after minutes of work.
    """
    free = shutil.disk_usage(dest).free
    if free < needed:
        raise CheckpointError(
            f"{dest}: no disk space: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        )


def replace_file(path: str | Path, text: str) -> None:
    """Writes `text` so that the file is the whole of it or is as it was; makes its folder.

    Raises:
        CheckpointError: it cannot be written (the message has the system's reason).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {one_line(error)}") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes `files`, by path below `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_folder(dest: str | Path) -> Iterator[Path]:
    """A temporary folder beside `dest` that becomes `dest` when the block ends without an error.

    Everything is flushed to disk before the rename. On any exception, KeyboardInterrupt included,
    the temporary folder is removed; one that a killed process left is removed by the next that
    writes to the same `dest`.

    Raises:
        CheckpointError: `dest` exists, or it cannot be written (the message has the system's
            reason).
    """
    dest = Path(os.path.abspath(dest))
    check_absent(dest)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(dest)
        prefix = f".{dest.name}.{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=dest.parent))
        lock = os.open(temporary, os.O_RDONLY)
        _lock(lock)
    except OSError as error:
        raise CheckpointError(f"{dest}: cannot be created: {one_line(error)}") from error
    try:
        # mkdtemp makes private folders; a checkpoint has the rights that the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        check_absent(dest)
        _flush(temporary)
        temporary.rename(dest)
        _flush_path(dest.parent)
    except OSError as error:
        raise CheckpointError(f"{dest}: cannot be written: {one_line(error)}") from error
    finally:
        _remove(temporary)
        os.close(lock)


def remove_abandoned(dest: Path) -> None:
    """Removes the temporary folders of `dest` whose writer is dead, killed or powered off.

    A writer holds a lock on its folder, which the kernel drops when it ends. Between making the
    folder and locking it, it is known by its process id; that may name another process in another
    container, so it counts for a minute only.
    """
    pattern = re.compile(rf"\.{re.escape(dest.name)}\.(\d+)-\w+\.part")
    for folder in dest.parent.iterdir():
        if (match := pattern.fullmatch(folder.name)) is None:
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                age = time.time() - os.fstat(lock).st_ctime
                young = age < LOCKED_AFTER_SECONDS and _is_alive(int(match[1]))
                if not young and _lock(lock):
                    logger.warning("%s: removed, its writer is dead", printable(str(folder)))
                    _remove(folder)
            finally:
                os.close(lock)


def _lock(handle: int) -> bool:
    """Locks a folder that is open as `handle`; False when it is locked, or cannot be."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no process id at all
        return True
    return True


def _remove(folder: Path) -> None:
    """Removes a folder into which a write that was interrupted may still be putting files."""
    for _ in range(REMOVE_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _flush_path(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _flush_path(os.path.join(root, name))
        _flush_path(root)


def check_section(document: str | Path, name: str) -> None:
    """Raises DataError where `replace_section` would; asked before long work."""
    _around_section(Path(document), name)


def replace_section(document: str | Path, name: str, text: str) -> None:
    """Replaces what stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        DataError: there is no such document, or it has no such lines.
        CheckpointError: it cannot be written.
    """
    before, after = _around_section(Path(document), name)
    replace_file(document, f"{before}\n\n{text}\n{after}")


def _around_section(document: Path, name: str) -> tuple[str, str]:
    """What stands before a section and after it, its markers included."""
    if not document.is_file():
        raise DataError(f"there is no document {document}")
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = document.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise DataError(f"{document}: has no lines {first} and {last}")
    return before + begin, end + after
