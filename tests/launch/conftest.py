"""Checkpoints, ports and children for tests of launching."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl
from tests.nvml.standin import nvml_library, nvml_machine
from tests.waiting import HANG

__all__ = ["Child", "nvml_library", "nvml_machine"]

REPO = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).with_name("standin")


class Child:
    """A process whose stderr is read line by line; its whole group is killed at the end."""

    def __init__(self, argv: list[str], *, standin: bool = True, **environ: str) -> None:
        paths = [str(REPO), *([str(STANDIN)] if standin else [])]
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def stderr(self) -> str:
        """All that was read so far."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, count: int = 1, limit: float = HANG) -> str:
        """Wait until so many lines have this text, and return the last of these."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines if text in line]
            return len(found) >= count or self._ended

        with self._news:
            self._news.wait_for(there, limit)
        assert len(found) >= count, f"not {count} times {text!r} in:\n{self.stderr}"
        return found[count - 1]

    def finish(self, limit: float = HANG) -> int:
        """Wait for its end."""
        code = self.process.wait(limit)
        self._reader.join(HANG)
        return code

    def kill(self) -> None:
        """Kill what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Children to be killed when the test ends."""
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


@pytest.fixture(scope="session")
def internvl2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL2."""
    return make_internvl2(tmp_path_factory.mktemp("checkpoints") / "InternVL2-tiny")


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL."""
    return make_qwen2_vl(tmp_path_factory.mktemp("checkpoints") / "Qwen2-VL-tiny")


@pytest.fixture(scope="session")
def internvl_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL3 in the Transformers format."""
    return make_internvl_hf(tmp_path_factory.mktemp("checkpoints") / "InternVL3-tiny-hf")


@pytest.fixture
def port() -> int:
    """Two consecutive ports that nobody has right now; the first."""
    return free_port()


def free_port() -> int:
    """Two consecutive ports that nobody has right now; the first.

    From below the range of outgoing connections, where nobody's own end can be in the way later.
    """
    for _ in range(200):
        number = random.randrange(21000, 32000)
        with (
            socket.socket() as first,
            socket.socket() as second,
            contextlib.suppress(OSError),
        ):
            first.bind(("127.0.0.1", number))
            second.bind(("127.0.0.1", number + 1))
            return number
    raise AssertionError("no two free ports")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, limit: float = HANG) -> bool:
    """Whether a process ends, or has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], limit)[0])
    finally:
        os.close(watched)


def pids(child: Any, name: str = "") -> list[int]:
    """The engines' processes, as the launcher named them, in the order of their starts."""
    return [
        int(line.partition("(process ")[2].partition(",")[0])
        for line in child.lines
        if "(process " in line and name in line
    ]
