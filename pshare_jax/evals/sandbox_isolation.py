"""Namespaces for one untrusted program: a file system, processes and a network of its own.

`sandbox_runner.py` loads this file by its path; it imports nothing but the standard library. What
is left of the system is read-only and holds Python and the shared libraries; the working folder is
a small file system in memory. All of it is the kernel's doing (user_namespaces(7), pivot_root(2)),
so it does not depend on what the program can reach in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_NOATIME, _NODIRATIME, _BIND, _REC, _PRIVATE, _RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
_KEPT = {
    os.ST_NOSUID: _NOSUID,
    os.ST_NODEV: _NODEV,
    os.ST_NOEXEC: _NOEXEC,
    os.ST_NOATIME: _NOATIME,
    os.ST_NODIRATIME: _NODIRATIME,
    os.ST_RELATIME: _RELATIME,
}
"""Flags that a mount of the system may have, and that a bind of it may not lose."""

_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAPABILITY_VERSION = 0x20080522
_DEVICES = ("null", "zero", "random", "urandom")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix", "/etc/ld.so.cache", "/etc/localtime")
_WORK_OPTIONS = "size=64m,nr_inodes=4096,mode=700"


def isolate(folder: str, user: int, group: int) -> bool:
    """Goes on in namespaces, where the system permits it, as their first process.

    When it ends, the kernel ends all that it has started. The parent waits for it and ends with its
    code.

    Args:
        folder: the working folder; the program sees one of the same path, empty and in memory.
        user: the user id that the caller will run the program as.
        group: likewise, its group.

    Returns:
        Whether the file system is another one, too. If not, there are namespaces for processes and
        network at best.

    Raises:
        OSError: something failed that cannot be undone.
    """
    if sys.platform != "linux":
        return False
    alone = _unshare(_NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET)
    if not alone and not _unshare(_NEWPID | _NEWNET):
        return False
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # As a shell does: 128 + the signal.
        os._exit(status if status >= 0 else 128 - status)
    return alone and _change_root(folder, user, group)


def drop_capabilities() -> None:
    """Gives up every capability, also those within a user namespace; there is no way back."""
    if sys.platform != "linux":
        return
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    if ctypes.CDLL(None).capset(header, bytes(24)):
        raise OSError("capabilities cannot be given up")


def filter_calls(program: bytes) -> None:
    """Has the kernel deny system calls from now on, by a compiled filter; there is no way back.

    The process must have given up gaining privileges (no_new_privs) before.

    Raises:
        OSError: the kernel takes no filters, or not this one.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: how many instructions, and where.
    filter_ = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls is not taken")


def _unshare(flags: int) -> bool:
    """Enters namespaces; a user who is not root gets a user namespace, as himself."""
    user, group = os.geteuid(), os.getegid()
    if user:
        flags |= _NEWUSER
    if ctypes.CDLL(None).unshare(flags):
        return False
    if user:
        maps = {
            "setgroups": "deny",
            "uid_map": f"{user} {user} 1",
            "gid_map": f"{group} {group} 1",
        }
        for name, text in maps.items():
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _change_root(folder: str, user: int, group: int) -> bool:
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _mount("none", "/", None, _REC | _PRIVATE)
        _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    except OSError:
        return False
    try:
        _populate(folder, user, group)
        os.chdir(folder)
        if libc.syscall(number, b".", b"."):
            raise OSError(ctypes.get_errno(), "pivot_root")
    except OSError:
        os.chdir("/")
        libc.umount2(folder.encode(), _DETACH)
        os.chdir(folder)
        return False
    if libc.umount2(b".", _DETACH):
        raise OSError(ctypes.get_errno(), "the old root cannot be left")
    os.chdir(folder)
    return True


def _populate(root: str, user: int, group: int) -> None:
    """Lays out the new root: the system read-only, devices, processes, the working folder."""
    for path in dict.fromkeys((*_SYSTEM, os.path.realpath(sys.base_prefix))):
        _show(path, root)
    for name in _DEVICES:
        _show(f"/dev/{name}", root)
    os.makedirs(f"{root}/proc", exist_ok=True)
    # Denied within containers that hide parts of /proc; the program needs none.
    with contextlib.suppress(OSError):
        _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    work = root + root
    os.makedirs(work)
    _seal(root)
    _mount("tmpfs", work, "tmpfs", _NOSUID | _NODEV, _WORK_OPTIONS)
    os.chown(work, user, group)


def _show(path: str, root: str) -> None:
    """Binds `path` of the system to the same path below `root`; a link stays a link."""
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, _BIND | _REC)


def _seal(root: str) -> None:
    """Makes every mount at and below `root` read-only."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split(" ")[4].encode().decode("unicode_escape") for line in file]
    for point in sorted(p for p in points if p == root or p.startswith(f"{root}/")):
        flags = os.statvfs(point).f_flag
        kept = sum(mount for stat, mount in _KEPT.items() if flags & stat)
        _mount("none", point, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (source.encode(), target.encode(), kind and kind.encode())
    if libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}")
