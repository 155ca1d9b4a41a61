"""Files at paths that others may have got to first, as in `/dev/shm`: opened if they are ours."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class NotPrivateError(OSError):
    """A file that others may use, or that is none; `strerror` says so, and what to do about it."""


def open_private(path: str | Path, flags: int = 0) -> int:
    """A descriptor of an ordinary file of this user alone, to be read and written.

    Args:
        path: not of a link, which could lead to any file that this user may write to.
        flags: more of them, such as `os.O_CREAT`.

    Raises:
        NotPrivateError: something else is there.
        OSError: it cannot be opened.
    """
    # Not waiting for the other end of what turns out to be a pipe.
    always = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, always | flags, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        why = "is a symbolic link; give the path of the file itself"
        raise NotPrivateError(errno.ELOOP, why, str(path)) from None
    why = _others_may(os.fstat(descriptor))
    if why:
        os.close(descriptor)
        raise NotPrivateError(errno.EPERM, why, str(path))
    return descriptor


def _others_may(about: os.stat_result) -> str:
    """In what way a file is not this user's alone, if it is not.

    What others may write to could hold what they like, and they could read what is written.
    """
    if not stat.S_ISREG(about.st_mode):
        return "is no ordinary file; give another path"
    if about.st_uid != os.geteuid():
        return (
            f"belongs to user {about.st_uid}, and this server runs as {os.geteuid()}; give it a "
            "path of its own"
        )
    if about.st_mode & 0o077:
        return (
            f"can be used by others (its mode is {about.st_mode & 0o777:o}); `chmod 600` it if "
            "nobody has, else remove it"
        )
    return ""
