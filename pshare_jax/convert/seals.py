"""Whether a checkpoint is still what was converted, as far as can be told without its tensors.

`seals.json` beside the manifest records a hash of each small file and of each tensor's metadata and
stored checksums. With the fingerprint it finds what a person or a tool has changed: a swapped
layer, another template, another dtype. It does not protect from somebody who changes it as well;
`inspect --check` reads every tensor.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pshare_jax.convert.files import one_line, replace_file
from pshare_jax.convert.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FOLDER,
    Manifest,
    read_json,
    read_manifest,
    tokenizer_hash,
)
from pshare_jax.convert.zarr import seal
from pshare_jax.errors import CheckpointError
from pshare_jax.kernels.native.loading import give_way

logger = logging.getLogger(__name__)

SEALS_FILE = "seals.json"
_READERS = 8
_CURE = (
    "restore it or convert again; if the change was meant, "
    "`python -m pshare_jax.convert inspect --accept` checks all else and records it"
)


def open_checkpoint(folder: str | Path, *, gentle: bool = False) -> Manifest:
    """Reads the manifest of the checkpoint in `folder`, and checks it with `check_unchanged`.

    Args:
        folder: of the checkpoint.
        gentle: by the calling thread alone, since others have work to do.

    Raises:
        CheckpointError: as `read_manifest` and `check_unchanged`.
    """
    manifest = read_manifest(folder)
    check_unchanged(manifest, readers=1 if gentle else _READERS)
    return manifest


def check_unchanged(manifest: Manifest, readers: int = _READERS) -> None:
    """Checks everything that the fingerprint covers, and the small files; reads no tensor.

    That the fingerprint is that of the configuration and the recorded hashes, `read_manifest` sees.

    A checkpoint without `seals.json` was made before there were any: what needs it is left out,
    which are swapped tensors of one shape, and files that the fingerprint does not cover.

    Raises:
        CheckpointError: names the first file or tensor that is not what was converted.
    """
    _check_tokenizer(manifest)
    seals = _read_seals(manifest.folder)
    if seals is None:
        logger.debug("%s: has no %s, so not all is checked", manifest.folder, SEALS_FILE)
    else:
        _compare(manifest.folder, seals["files"], _hashes(manifest.folder))
    for name, found in _tensor_seals(manifest, readers=readers).items():
        if seals is not None and seals["tensors"].get(name) != found:
            raise CheckpointError(
                f"{manifest.folder / WEIGHTS_FOLDER / name}: is not the tensor that was "
                "converted; restore it or convert again"
            )


def write_seals(folder: Path, manifest: Manifest) -> None:
    """Writes `seals.json` for the checkpoint that lies in `folder`, complete but for it."""
    content = {"files": _hashes(folder), "tensors": _tensor_seals(manifest, folder)}
    replace_file(folder / SEALS_FILE, json.dumps(content, indent=1) + "\n")


def _check_tokenizer(manifest: Manifest) -> None:
    if manifest.kind != "prefill":
        return
    path = manifest.folder / TOKENIZER_FOLDER / TOKENIZER_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    if tokenizer_hash({TOKENIZER_FILE: content}) != manifest.tokenizer_hash:
        raise CheckpointError(f"{path}: changed since the import; restore it or import again")


def _read_seals(folder: Path) -> dict[str, dict[str, str]] | None:
    path = folder / SEALS_FILE
    if not path.exists():
        return None
    seals = read_json(path)
    if any(not isinstance(seals.get(part), dict) for part in ("files", "tensors")):
        raise CheckpointError(f"{path}: malformed; {_CURE}")
    return seals


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the manifest's files and the tokenizer's, by path below `folder`."""
    tokenizer = sorted((folder / TOKENIZER_FOLDER).rglob("*"))
    paths = [folder / MANIFEST_FILE, folder / TENSORS_FILE, *filter(Path.is_file, tokenizer)]
    try:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        }
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from error


def _compare(folder: Path, recorded: Mapping[str, Any], found: Mapping[str, str]) -> None:
    for name in sorted({*recorded, *found}):
        if recorded.get(name) != found.get(name):
            what = "changed" if name in recorded and name in found else "added"
            what = what if name in found else "removed"
            raise CheckpointError(f"{folder / name}: {what} since the conversion; {_CURE}")


def _tensor_seals(
    manifest: Manifest, folder: Path | None = None, readers: int = _READERS
) -> dict[str, str]:
    weights = (folder or manifest.folder) / WEIGHTS_FOLDER

    def of(name: str) -> str:
        entry = manifest.tensors[name]
        return seal(weights, name, entry.shape, entry.dtype)

    if readers == 1:
        found = {}
        for name in manifest.tensors:
            give_way()
            found[name] = of(name)
        return found
    # Hundreds of small reads, each of which waits for a network file system.
    with ThreadPoolExecutor(readers) as pool:
        return dict(zip(manifest.tensors, pool.map(of, manifest.tensors), strict=True))
