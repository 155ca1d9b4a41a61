"""Which system calls a program may not make: a filter that the kernel applies (seccomp).

It is compiled here, by libseccomp through `pyseccomp` (the extra `sandbox`), and handed to the
program's process as bytes, which has nothing but the standard library. What is listed is what a
program that computes has no need of: other programs and processes, networks, the kernel's more
dangerous doors, and all that takes privileges.
"""

from __future__ import annotations

import errno
import functools
import logging
import tempfile

logger = logging.getLogger(__name__)

_DENIED = (
    # Programs and processes; threads are made by clone, see below.
    *("execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev"),
    *("kcmp", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "process_madvise"),
    # Networks.
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"),
    # File systems and namespaces.
    *(
        "mount",
        "umount",
        "umount2",
        "pivot_root",
        "chroot",
        "unshare",
        "setns",
        "fsopen",
        "fsmount",
    ),
    *("fsconfig", "fspick", "open_tree", "move_mount", "mount_setattr", "open_by_handle_at"),
    *("name_to_handle_at", "mknod", "mknodat", "swapon", "swapoff", "quotactl", "quotactl_fd"),
    *("fanotify_init", "fanotify_mark"),
    # Where faults of the kernel have been found again and again.
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter"),
    *("io_uring_register", "keyctl", "add_key", "request_key", "vmsplice", "modify_ldt"),
    *(
        "lookup_dcookie",
        "personality",
        "io_setup",
        "io_submit",
        "memfd_secret",
        "landlock_add_rule",
    ),
    # The system itself.
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "stime", "sethostname"),
    *("setdomainname", "acct", "syslog", "iopl", "ioperm", "vhangup", "nfsservctl", "uselib"),
    # Other users' shoes.
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid"),
    *("setgroups", "capset"),
)
_CLONE_THREAD = 0x00010000
_TIOCSTI = 0x5412


@functools.cache
def compiled_filter() -> bytes | None:
    """The filter as the kernel takes it, for this machine; None where libseccomp is not there.

    Calls that it denies fail with EPERM; one of another architecture ends the program.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        logger.info("answers run without a filter of system calls: %s", error)
        return None
    denied = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        try:
            rules.add_rule(denied, name)
        except ValueError:
            continue  # this architecture, or this libseccomp, does not know it
    no_thread = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0)
    rules.add_rule(denied, "clone", no_thread)
    # Its flags are in memory, which no filter sees; the C library then makes threads by clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(denied, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, _TIOCSTI))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
