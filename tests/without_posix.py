"""Runs turbofit's command line as on Windows: without what only POSIX systems have.

    python -m tests.without_posix plan internvl2-8b --on 4xrtx3090
    python -m tests.without_posix --each    # reads command lines, prints JSON

What is taken away is what the library reference marks ``Availability: Unix``, as of Python 3.10 to
3.12 on Windows (``os.fchmod`` and ``os.set_blocking`` came there with 3.13 and 3.12).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from typing import Final

MODULES: Final = (
    "_posixshmem", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog",
    "termios", "tty",
)  # fmt: skip
#: Of `os`.
NAMES: Final = (
    "O_ACCMODE", "O_ASYNC", "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_DSYNC", "O_NOATIME",
    "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "O_SYNC", "O_TMPFILE",
    "chown", "chroot", "confstr", "copy_file_range", "ctermid", "eventfd", "fchdir", "fchmod",
    "fchown", "fdatasync", "fork", "forkpty", "fpathconf", "fstatvfs", "getegid", "geteuid",
    "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getrandom",
    "getresgid", "getresuid", "getsid", "getuid", "getxattr", "initgroups", "killpg", "lchown",
    "listxattr", "lockf", "major", "makedev", "memfd_create", "minor", "mkfifo", "mknod", "nice",
    "openpty", "pathconf", "pipe2", "posix_fadvise", "posix_fallocate", "posix_spawn",
    "posix_spawnp", "pread", "preadv", "pwrite", "pwritev", "readv", "register_at_fork",
    "removexattr", "sched_getaffinity", "sched_getscheduler", "sched_setaffinity", "sched_yield",
    "sendfile", "set_blocking", "setegid", "seteuid", "setgid", "setgroups", "setpgid",
    "setpriority", "setregid", "setreuid", "setsid", "setuid", "setxattr", "splice", "statvfs",
    "sync", "sysconf", "tcgetpgrp", "tcsetpgrp", "ttyname", "uname", "wait", "wait3", "wait4",
    "waitid", "writev",
)  # fmt: skip
SIGNALS: Final = (
    "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGIO", "SIGKILL", "SIGPIPE", "SIGPROF",
    "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2", "SIGWINCH",
    "alarm", "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt",
    "sigpending", "sigtimedwait", "sigwait", "sigwaitinfo",
)  # fmt: skip


def take_away() -> None:
    """From now on they are missing, for whoever imports or asks for them."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in (
        (os, NAMES), (signal, SIGNALS), (socket, ("AF_UNIX", "SO_REUSEPORT")),
        (time, ("clock_gettime", "tzset")),
    ):  # fmt: skip
        for name in names:
            if hasattr(module, name):
                delattr(module, name)


if __name__ == "__main__":
    # Both need some of it on this system.
    import asyncio  # noqa: F401
    import subprocess  # noqa: F401

    take_away()
    from turbofit.cli import main
    from turbofit.cli.terminal import screen

    screen.WINDOWS = True
    if sys.argv[1:] == ["--each"]:
        for line in sys.stdin:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main.main(line.split())
            sys.stdout.write(f"{json.dumps([code, out.getvalue(), err.getvalue()])}\n")
    else:
        main.entry()
