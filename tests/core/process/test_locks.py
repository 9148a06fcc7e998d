"""Locks that nobody waits for without end."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from turbofit.core.process import locks
from turbofit.core.process.locks import lock_soon


def test_it_is_waited_for_until_its_owner_lets_it_go(tmp_path: Path, monkeypatch) -> None:
    owner, other = (os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR) for _ in range(2))
    fcntl.flock(owner, fcntl.LOCK_EX)
    pauses = []

    def paused(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            fcntl.flock(owner, fcntl.LOCK_UN)

    monkeypatch.setattr(locks.time, "sleep", paused)
    lock_soon(other)
    assert len(pauses) == 3
    with pytest.raises(BlockingIOError):
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(owner)
    os.close(other)


def test_who_keeps_it_is_given_up(tmp_path: Path, monkeypatch) -> None:
    owner, other = (os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR) for _ in range(2))
    fcntl.flock(owner, fcntl.LOCK_EX)
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    with pytest.raises(TimeoutError, match="keeps its lock"):
        lock_soon(other)
    assert now[0] == pytest.approx(2.0, abs=0.1)
    os.close(owner)
    os.close(other)
