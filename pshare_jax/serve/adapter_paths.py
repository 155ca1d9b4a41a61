"""Which folders decode modules may be loaded from while the server runs."""

from __future__ import annotations

import os
from pathlib import Path

from pshare_jax.serve.errors import ApiError


def adapter_folder(root: str, given: str) -> Path:
    """The folder that a client names, which must lie below `root`.

    Neither `..` nor symbolic links lead there, or anywhere in it: what is loaded is what an
    operator has put below `root`.

    Args:
        root: `server.adapter_root`; may be a link itself.
        given: the client's path, absolute or below `root`.

    Raises:
        ApiError: 400, says which rule it breaks.
    """
    base = Path(root).expanduser().absolute()
    path = Path(given)
    if not given or "\0" in given or ".." in path.parts:
        raise _refused("must be a path without '..'")
    if path.is_absolute() and not path.is_relative_to(base):
        raise _refused("is not below server.adapter_root")
    relative = path.relative_to(base) if path.is_absolute() else path
    if not relative.parts:
        raise _refused("is server.adapter_root itself; name a folder below it")
    try:
        return _without_links(base, relative)
    except OSError as error:
        raise _refused(f"cannot be read: {error.strerror}") from None


def _without_links(base: Path, relative: Path) -> Path:
    folder = base
    for part in relative.parts:
        folder /= part
        if folder.is_symlink():
            raise _refused("leads over a symbolic link")
    if not folder.is_dir():
        raise _refused("is no folder below server.adapter_root")
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                raise _refused(f"holds a symbolic link, {name[:100]!r}")
    return folder


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"lora_path {reason}", param="lora_path", code="invalid_path")
