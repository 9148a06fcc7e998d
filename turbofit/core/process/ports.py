"""Checks of TCP ports, and the limit of open files of this process."""

from __future__ import annotations

from typing import Final

#: LMDeploy's default port.
DEFAULT_PORT: Final = 23333
LAST_PORT: Final = 65535


def port_problem(host: str, port: int) -> str | None:
    """Why a port cannot be bound; None if it can."""
    import socket

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        return f"port {port} cannot be used: {reason}"
    return None


def open_files(need: int) -> int:
    """Try to raise the limit of open files to ``need``; returns how many are then allowed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return need
    raised = need if hard == resource.RLIM_INFINITY else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # a sandbox may forbid what the limit allows
        return soft
    return raised
