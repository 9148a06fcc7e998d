"""Which signals end a server in order: seen in a process that inherits what its parent set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from turbofit.core.process.signals import ended_like_ctrl_c

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


@pytest.fixture
def by_default() -> Iterator[None]:
    """SIGTERM and SIGHUP end a process at once."""
    before = [(n, signal.signal(n, signal.SIG_DFL)) for n in (signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_what_would_end_a_process_at_once_lets_it_clear_away(by_default: None) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(KeyboardInterrupt), ended_like_ctrl_c():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with ended_like_ctrl_c():  # who handles a signal goes on doing so
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
