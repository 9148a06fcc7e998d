"""Which signals end a server in order: seen in a process that inherits what its parent set."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from turbofit.core.process.signals import stop_signals, unblock
heard = stop_signals()
for number in heard:
    signal.signal(number, lambda got, _: print("caught", signal.Signals(got).name))
os.kill(os.getpid(), signal.SIGTERM)
unblock(heard)
print(*sorted(number.name for number in heard))
"""


@pytest.mark.parametrize(
    ("ignored", "heard"),
    [
        ((), "SIGHUP SIGINT SIGTERM"),
        ((signal.SIGINT, signal.SIGTERM), "SIGHUP SIGINT SIGTERM"),
        ((signal.SIGHUP,), "SIGINT SIGTERM"),
    ],
)
@pytest.mark.parametrize("blocked", [(), (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
def test_what_is_heard(
    ignored: tuple[signal.Signals, ...], blocked: tuple[signal.Signals, ...], heard: str
) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["caught SIGTERM", heard]
